"""The page of ``attrib-zoo app``, in Gradio: what is on it, and what each part does when used."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from attrib_zoo.cli.studio import MOST_CLASSES, MOST_METHODS, OPACITY, Sight, Studio, gallery, write_maps, write_picture
from attrib_zoo.errors import AttribZooError, OptionError

_LARGEST = "64mb"  # of a file
_VISITORS, _WAITING, _AT_ONCE = 64, 64, 2
_HOUR = 3600  # seconds after which files are deleted

_CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.gradio-container main { width: 100%; }
#said, #top, #maps { padding: 0 !important; }
#said .html-container, #top .html-container, #maps .html-container { padding: 0 !important; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 150px), 1fr)); gap: 14px; }
.maps + .maps { margin-top: 18px; }
.maps figure { margin: 0; min-width: 0; max-width: 620px; }
.maps img { width: 100%; height: auto; display: block; border-radius: 6px; }
.maps figcaption { padding: 6px 2px 0; line-height: 1.35; font-size: 14px; overflow-wrap: anywhere; }
.maps figcaption span { opacity: .75; }
#said { min-height: 0; }
.said { padding: 10px 14px; border-radius: 6px; background: var(--block-background-fill);
  border: 1px solid var(--border-color-primary); }
.said.wrong { background: #fdecea; border-color: #e0a8a0; color: #7a1c10; }
.top { width: 100%; border-collapse: collapse; font-size: 14px; margin: 0 !important; }
.top, .top tr, .top td { border: 0 !important; }
.top td { padding: 4px 6px !important; } .top td:last-child { text-align: right; width: 5em; }
.top .bar { height: 5px; border-radius: 3px; background: var(--color-accent); min-width: 2px; }
"""


def check_installed() -> None:
    """Raise where Gradio is not installed.

    Raises:
        OptionError: it is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise OptionError("app: needs Gradio, which is not installed; pip install 'attrib_zoo[app]'") from error


def serve(studio: Studio, *, title: str, host: str, port: int) -> None:
    """Show the page at this address until Ctrl-C."""
    launch(studio, title=title, host=host, port=port, block=True)


def launch(studio: Studio, *, title: str, host: str = "127.0.0.1", port: int | None = None, block: bool = False) -> Any:
    """Start the page; returns Gradio's ``Blocks``, whose ``local_url`` is its address."""
    check_installed()
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = build(studio, title)
    blocks.queue(default_concurrency_limit=_AT_ONCE, max_size=_WAITING)
    blocks.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        prevent_thread_lock=not block,
        max_file_size=_LARGEST,
        state_session_capacity=_VISITORS,
        theme=theme,
        css=_CSS,
        footer_links=[],
        ssr_mode=False,
        quiet=not block,
    )
    return blocks


def build(studio: Studio, title: str) -> Any:
    """The page, not started."""
    import gradio as gr

    acts = _Acts(studio)
    names = [(studio.loaded.class_name(i), i) for i in range(studio.loaded.num_classes)]
    held: dict[str, Any] = {"analytics_enabled": False, "delete_cache": (_HOUR, _HOUR), "fill_width": True}
    with gr.Blocks(title=f"{title} explained", **held) as blocks:
        state = gr.State(None)
        gr.Markdown(f"## Which regions made `{title}` decide?")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                file = gr.File(label="A photograph", type="filepath", elem_id="photo", height=150)
                preview = gr.Image(label="As it is", show_label=False, interactive=False, visible=False, buttons=[])
                top = gr.HTML(elem_id="top")
            with gr.Column(scale=1, min_width=300):
                classes = gr.Dropdown(
                    names, label="Classes, one or two", multiselect=True, max_choices=MOST_CLASSES, elem_id="classes"
                )
                methods = gr.Dropdown(
                    studio.methods,
                    value=studio.first,
                    label="Methods, up to four",
                    multiselect=True,
                    max_choices=MOST_METHODS,
                    elem_id="methods",
                )
                go = gr.Button("Explain", variant="primary", elem_id="go")
                opacity = gr.Slider(0, 1, OPACITY, step=0.05, label="Opacity", elem_id="opacity")
                smooth = gr.Slider(0, 30, 0, step=1, label="Smoothing, % of the map's side", elem_id="smooth")
        said = gr.HTML(_said("Drop a photograph to begin."), elem_id="said")
        maps = gr.HTML(elem_id="maps")
        with gr.Row():
            png = gr.DownloadButton("Download picture", interactive=False, elem_id="png")
            npz = gr.DownloadButton("Download raw maps", interactive=False, elem_id="npz")
        drawn = [maps, png, npz]
        file.change(acts.look, [file], [state, preview, top, classes, said, *drawn], api_visibility="private")
        go.click(
            acts.explain, [state, classes, methods, opacity, smooth], [state, said, *drawn], api_visibility="private"
        )
        last: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private"}
        for slider in (opacity, smooth):  # while it is dragged, only its last position counts
            slider.change(acts.draw, [state, opacity, smooth], drawn, **last)
    return blocks


class _Acts:
    """The event handlers; each visitor's state is passed in and out, so that nothing is shared."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def look(self, path: str | None) -> tuple[Any, ...]:
        import gradio as gr

        empty = (gr.update(value=None, visible=False), "", gr.update(value=[]))
        if path is None:
            return None, *empty, _said("Drop a photograph to begin."), *self._nothing()
        try:
            sight = self.studio.look(path)
        except AttribZooError as error:
            return None, *empty, _said(str(error).replace(str(path), Path(path).name), wrong=True), *self._nothing()
        best = self.studio.top(sight)
        rows = "".join(
            f'<tr><td>{_safe(name)}<div class="bar" style="width:{share:.1%}"></div></td><td>{share:.1%}</td></tr>'
            for name, _, share in best
        )
        told = _said("Choose classes and methods, then press Explain.")
        shown = gr.update(value=sight.pixels, visible=True)
        return sight, shown, f'<table class="top">{rows}</table>', [best[0][1]], told, *self._nothing()

    def explain(
        self, sight: Sight | None, classes: list[int], methods: list[str], opacity: float, smooth: float
    ) -> tuple[Any, ...]:
        if sight is None:
            return None, _said("Drop a photograph first.", wrong=True), *self._nothing()
        try:
            found, wrong = self.studio.explain(sight, classes or [], methods or [])
        except AttribZooError as error:
            return sight, _said(str(error), wrong=True), *self._nothing()
        told = _said("<br>".join(map(_safe, wrong)), wrong=True, safe=True) if wrong else _said(f"{sight.name}: done.")
        return found, told, *self.draw(found, opacity, smooth)

    def draw(self, sight: Sight | None, opacity: float, smooth: float) -> tuple[Any, ...]:
        import gradio as gr

        if sight is None or not sight.maps:
            return self._nothing()
        stem = Path(sight.name).stem[:60] or "photograph"
        folder = Path(tempfile.mkdtemp(prefix="attrib-zoo-"))
        png = write_picture(self.studio, sight, opacity, smooth / 100, folder / f"{stem}-maps.png")
        npz = write_maps(self.studio, sight, folder / f"{stem}-maps.npz")
        shown = gallery(self.studio, sight, opacity, smooth / 100)
        return shown, gr.update(value=str(png), interactive=True), gr.update(value=str(npz), interactive=True)

    @staticmethod
    def _nothing() -> tuple[Any, ...]:
        import gradio as gr

        return "", gr.update(value=None, interactive=False), gr.update(value=None, interactive=False)


def _safe(text: str) -> str:
    import html

    return html.escape(text)


def _said(text: str, *, wrong: bool = False, safe: bool = False) -> str:
    return f'<div class="said{" wrong" * wrong}" role="status">{text if safe else _safe(text)}</div>'
