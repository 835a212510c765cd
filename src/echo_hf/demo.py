"""A page on this machine to try a checkpoint on. Needs gradio: `pip install ".[demo]"`.

Nothing leaves the machine: gradio shares no link, reports no usage and loads no fonts.
"""

import os
from pathlib import Path
from typing import Any

import soundfile

from .analysis.plotting import LONGEST_PICTURE, plot_pitch
from .inference import BUNDLED_RECORDINGS, find_audio_files, make_pipeline


def build_demo(model, processor):
    """
    The page of a model and its processor, a `gradio.Blocks`: audio from a file or the microphone in; text, F0 on the
    spectrogram and the times of words out. Raises `ImportError` without gradio or matplotlib.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    try:
        import gradio
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The demo needs gradio and matplotlib ({error}): `pip install '.[demo]'` in the clone."
        ) from error

    pipeline = make_pipeline(model, processor)
    has_pitch = "pitch" in processor.feature_extractor.feature_groups

    def recognize(audio: str | None) -> tuple[str, Any, list[list[Any]]]:
        if audio is None:
            raise gradio.Error("Drop an audio file, or record something, first.", print_exception=False)
        try:
            result = pipeline(audio, return_timestamps="word")
            draws = has_pitch and soundfile.info(audio).duration <= LONGEST_PICTURE
            figure = plot_pitch(audio, processor.feature_extractor, words=result["chunks"]) if draws else None
        except ValueError as error:
            message = str(error).replace(audio, Path(audio).name)  # without the server's folder
            raise gradio.Error(message, print_exception=False) from error
        rows = [[chunk["text"].strip(), *(round(time, 2) for time in chunk["timestamp"])] for chunk in result["chunks"]]
        return result["text"], figure, rows

    with gradio.Blocks(title="Echo", analytics_enabled=False) as demo:
        gradio.Markdown(
            "# Echo\n"
            "Drop an audio file or record your voice. The text is what this checkpoint recognizes; its model card says"
            " how accurate it is."
        )
        with gradio.Row():
            with gradio.Column(scale=1):
                audio = gradio.Audio(sources=["upload", "microphone"], type="filepath", label="speech", buttons=[])
                button = gradio.Button("Transcribe", variant="primary")
                if BUNDLED_RECORDINGS.is_dir():
                    examples = [[str(path)] for path in find_audio_files(BUNDLED_RECORDINGS)]
                    gradio.Examples(examples, inputs=audio, label="recordings to try", cache_examples=False)
            with gradio.Column(scale=2):
                text = gradio.Textbox(label="text", lines=2)
                figure = gradio.Plot(show_label=False, visible=has_pitch)  # a label would cover words
                table = gradio.Dataframe(headers=["word", "start (s)", "end (s)"], label="words", interactive=False)
        button.click(recognize, audio, [text, figure, table], api_name="recognize", show_progress_on=text)
    return demo


def launch(demo, host: str = "127.0.0.1", port: int = 7860) -> str:
    """Serves the page of [`build_demo`] until the program ends, and returns its address; raises `ValueError` if the
    port is taken."""
    import gradio

    # Fonts of the browser, since many of gradio's themes load theirs from elsewhere.
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = demo.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, theme=theme
        )
    except OSError as error:
        raise ValueError(f"The page cannot be served at {host}:{port} ({error}); try another --port.") from error
    return address


__all__ = ["build_demo", "launch"]
