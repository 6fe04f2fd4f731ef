"""Made-up results of an evaluation, their pictures, and a reader of the page."""

from html.parser import HTMLParser

from PIL import Image

from asymflow_ft.evaluation.report import write_report
from asymflow_ft.evaluation.results import Difference, Metric, Model, Results, Value

ERROR = Metric("picture_error", "picture error", "lower", "colour and layout")
SCORE = Metric("clip", "CLIP score", "higher", "text and picture", "reads 77 tokens")
SHARP = Metric("sharpness", "sharpness", "closer", "differences of neighbours")
PROMPTS = [
    "red apple",
    "<script>alert('x')</script><img src=http://x.test/y onerror=z> & \"both\" 'quotes' </style>",
    "صورة قطة تجلس على سجادة حمراء",
    "一只坐在窗边的猫 &amp; {{ results }}",
    "a very " + "very " * 300 + "long prompt",
]
VOID = {"meta", "img", "br", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Text, tables, attributes and tags; every tag must be closed in order."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.text, self.attributes, self.tags, self.rows, self.styles = [], "", [], [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles += data
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, start):
        """Cells of the row whose first cell starts with `start`."""
        return next([" ".join(cell.split()) for cell in row] for row in self.rows if row[0].strip().startswith(start))


def results_of(prompts=PROMPTS, models=("pixels", "base"), size=(24, 24), per_prompt=1, **changes):
    first, *others = models
    values = [
        Value("picture_error", first, 3.1605, 3.013, 3.3288, 60), Value("clip", first, 0.2712, 0.269, 0.274, 60),
        Value("sharpness", first, 1.48, 1.31, 1.68, 60),
    ]  # fmt: skip
    differences = []
    for other in others:
        values += [
            Value("picture_error", other, 2.5092, 2.33, 2.68, 60), Value("clip", other, 0.2711, 0.268, 0.275, 60),
            Value("sharpness", other, 1.26, 1.10, 1.43, 60),
        ]  # fmt: skip
        differences += [
            Difference("picture_error", first, other, 0.6513, 0.542, 0.773, "worse"),
            Difference("clip", first, other, 0.0001, -0.0019, 0.0021, "no difference seen"),
            Difference("sharpness", first, other, -0.22, -0.33, -0.11, "better"),
        ]
    settings = {"steps": 12, "seed": 7, "models": {first: {"weights": "a3f9"}}}
    given = {
        "suite": "prompts.txt",
        "models": [
            Model(m, f"runs/{m}", "latent" if i else "pixel", size, 5_358_144 + i, 5, (0.3, 0.5 - i / 10, 0.6), 2.0)
            for i, m in enumerate(models)
        ],
        "prompts": [{"id": f"{i:04d}-x", "text": text, "category": None} for i, text in enumerate(prompts)],
        "per_prompt": per_prompt, "compared_at": size, "metrics": [ERROR, SCORE, SHARP], "values": values,
        "differences": differences, "spectra": {}, "settings": settings, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    return Results(**given | changes)


def draw(results, out, references=False):
    """A colour per kind: reference green, first model red, others blue."""
    colours = {model.name: "red" if i == 0 else "blue" for i, model in enumerate(results.models)}
    for model in results.models:
        (out / "images" / model.name).mkdir(parents=True)
        for prompt in results.prompts:
            for k in range(results.per_prompt):
                Image.new("RGB", model.size, colours[model.name]).save(
                    out / f"images/{model.name}/{prompt['id']}-{k}.png"
                )
    if references:
        (out / "references").mkdir()
        for prompt in results.prompts[:2]:
            Image.new("RGB", results.compared_at, "lime").save(out / f"references/{prompt['id']}.png")


def page_of(results, out):
    write_report(results, out)
    return Page((out / "report.html").read_text(encoding="utf-8"))
