"""Muon: orthogonal updates, the library's as the known answer, AdamW where it is AdamW."""

import copy

import pytest
import torch
from torch import nn

from echo_hf import EchoConfig
from echo_hf import EchoForConditionalGeneration
from echo_hf import optimization
from echo_hf.optimization import Muon
from echo_hf.optimization import create_muon
from echo_hf.optimization import orthogonalize

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


def tiny_model():
    torch.manual_seed(0)
    sizes = {"encoder_hidden_size": 16, "encoder_intermediate_size": 24, "encoder_kernel_size": 3}
    layers = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1, "self_conditioning_layers": [1]}
    return EchoForConditionalGeneration(EchoConfig.from_preset("all", vocab_size=30, **sizes, **layers))


def give_gradients(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 8, 8)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape, in_bfloat16, monkeypatch):
    monkeypatch.setattr(optimization, "has_bfloat16", lambda device: in_bfloat16)
    left, _ = torch.linalg.qr(torch.randn(shape[0], shape[1], min(shape[1:])))
    right, _ = torch.linalg.qr(torch.randn(shape[0], shape[2], min(shape[1:])))
    values = torch.logspace(0, -1, min(shape[1:]))
    result = orthogonalize(7.0 * left @ torch.diag(values) @ right.mT)
    assert result.dtype == (torch.bfloat16 if in_bfloat16 else torch.float32)
    turned = left.mT @ result.float() @ right
    found = turned.diagonal(dim1=1, dim2=2)
    assert ((found > 0.6) & (found < 1.3)).all()
    # bfloat16 rounds by a 256th, and each of five steps anew.
    torch.testing.assert_close(turned, torch.diag_embed(found), atol=0.05 if in_bfloat16 else 1e-4, rtol=0)


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_matrices_learn_as_by_the_muon_of_torch():
    """But for bfloat16, in which that one counts everywhere."""
    ours = nn.ParameterList([torch.randn(8, 20), torch.randn(20, 8), torch.randn(8, 20)])
    theirs = copy.deepcopy(ours)
    optimizer = Muon([{"params": list(ours), "muon": True}], **SETTINGS)
    reference = torch.optim.Muon(theirs.parameters(), adjust_lr_fn="match_rms_adamw", **SETTINGS)
    start = [parameter.detach().clone() for parameter in ours]
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start):
        assert (a - before).norm() > 10 * (a - b).norm()


def test_all_else_learns_as_by_adamw_and_gradients_stay():
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = create_muon(model, **SETTINGS)
    matrices, others, vectors = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert len(matrices) + len(others) + len(vectors) == len(names)
    assert all(".layers." in name or ".stem_layers." in name for name in matrices)
    assert {"model.decoder.embed_tokens.weight", "model.encoder.self_conditioning.weight"} <= set(others)
    assert "model.encoder.layers.0.convolution.convolution.weight" in others
    assert any("norm" in name for name in vectors)
    twin = tiny_model()
    twins = dict(twin.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [twins[name] for name in others]},
            {"params": [twins[name] for name in vectors], "weight_decay": 0.0},
        ],
        **SETTINGS,
    )
    for step in range(3):
        give_gradients(model, step)
        give_gradients(twin, step)
        optimizer.step()
        reference.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter, twins[name]) == (name not in matrices), name


def test_a_frozen_encoder_and_missing_gradients_stay_where_they_are():
    model = tiny_model()
    model.freeze_encoder()
    before = copy.deepcopy(model.state_dict())
    optimizer = create_muon(model, **SETTINGS)
    give_gradients(model.model.decoder.layers[0].mlp)
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"model.decoder.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}


def test_state_goes_on_where_it_was():
    straight, broken = tiny_model(), tiny_model()
    first, second = create_muon(straight, **SETTINGS), create_muon(broken, **SETTINGS)
    for step in range(4):
        if step == 2:
            state, second = second.state_dict(), create_muon(broken, **SETTINGS)
            second.load_state_dict(state)
        for model, optimizer in ((straight, first), (broken, second)):
            give_gradients(model, step)
            optimizer.step()
    for a, b in zip(straight.parameters(), broken.parameters()):
        assert torch.equal(a, b)


def test_a_closure_gives_the_loss():
    weight = nn.Parameter(torch.randn(3, 3))
    optimizer = Muon([{"params": [weight], "muon": True}], **SETTINGS)

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = weight.square().sum().item()
    assert optimizer.step(closure).item() == before and weight.square().sum() < before


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"Muon is for matrices, and got a parameter of shape \(4,\)"):
        Muon([{"params": [nn.Parameter(torch.zeros(4))], "muon": True}], **SETTINGS)
