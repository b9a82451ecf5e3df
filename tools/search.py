"""Search images by words or by a picture, with any CLIP or with every stage of a run.

    python -m tools.search RUN --query "黑色碳纤维材料表面"    a staged run: every row of its matrix
    python -m tools.search RUN --query queries.txt like_this.jpg --top 5
    python -m tools.search ViT-B/32 runs/mine --data photos --query "a dog on a beach"
    python -m tools.search RUN --embeddings                what tools.report draws maps from
    python -m tools.search RUN --clip-retrieval FOLDER     embeddings as that library has them

WEIGHTS is a staged run, whose test sets are searched, or what --weights of the scripts takes.
--data is a captioned set, as in the scripts, or a folder that is only images.

Leaves search.json, search.html and a sheet of pictures per query, a line for each row of weights.
A query that is a caption of a set has known answers: they are framed green, other images red, and
P@k is said: how many of the first k images are right, in % of how many could be. Features are kept
in embeddings/ROW/SET and found again by content: weights, bytes of the images, words.
"""
import contextlib
import functools
import hashlib
import html
import json
import pathlib
import sys
import types

from device import (add_device_flags, expanded, guard, Parser, start, UserError, whole,
                    write_atomic)  # before torch, which reads what it sets
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

import plans
import train_staged
from clip_model import evaluating
from data import DataError, is_image, Preprocess, read_image, read_text, UnreadableImage
from files import refuse_unusable, write_whole
from images import Images, ImageStore
from pairs import open_pairs
from scores import encode_images, encode_texts, image_features, top_k
from tokenizer import for_model
from tools.report import table, write_html
from weights import digest, load, read_json

TILE, LABEL = 112, 130  # pixels of a picture's side on a sheet, and of the space for a row's name
FRAMES = {None: "white", True: "#1a9850", False: "#d73027"}  # by whether an answer is right
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf",
         "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "PingFang.ttc",
         "STHeiti Light.ttc", "msyh.ttc", "simhei.ttf", "DejaVuSans.ttf")


# -----------------------------------------------------------------------------
# What is searched, and with which weights

def open_set(run, name, args):
    """A captioned set -> PairSet; of a folder that is only images, what a search needs of one."""
    try:
        return open_pairs(name, args.split or "test", args.data_dir or "data", whole=True)
    except DataError as error:
        folder = expanded(name)
        store = ImageStore(folder)
        paths = [path for path in store.names() if is_image(path)] if folder.is_dir() else []
        if not paths:
            raise
        run.say(f"{name}: {len(paths):,} images, no captions ({error})")
        return types.SimpleNamespace(name=folder.name, store=store, paths=paths, captions=[],
                                     owner=[])


def rows_of_run(folder, args):
    """A staged run -> [(label, weights)] of its matrix, and {name: pairs} of its test sets."""
    home = ["--data-dir", args.data_dir] if args.data_dir else []  # else where the run found it
    theirs = train_staged.get_args(["--config", str(folder / "config.json"), "--plan",
                                    str(folder / "plan.json"), *home])
    plan = plans.read_plan(theirs)
    args.tokenizer = args.tokenizer or theirs.tokenizer
    args.max_text = args.max_text or theirs.max_text
    rows = []
    for row in read_json(folder / "results.json")["rows"]:
        path = pathlib.Path(row["weights"])
        inside = folder / path.parent.name / path.name  # wherever the run was moved to
        rows.append((row["row"], inside if inside.is_file() else row["weights"]))
    return rows, train_staged.open_data(plans.read_stages(plan, theirs), plan.get("eval_sets", {}),
                                        theirs)


# -----------------------------------------------------------------------------
# Features, kept by their content

def content_of(pairs):
    """The sha256 of the names and bytes of a set's images."""
    content = hashlib.sha256()
    for path in pairs.paths:
        with contextlib.suppress(UnreadableImage):
            content.update(path.encode("utf-8", "surrogatepass") + pairs.store.read(path))
    return content.hexdigest()


def features(run, model, tokenizer, pairs, content, folder, args):
    """Unit features of a set's images (n, D) and texts (M, D), and its metadata; out of `folder`
    if the same weights and vocabulary made them there of the same images and words."""
    task = pairs.retrieval() if pairs.captions else None
    texts = task.texts if task else []
    images = Images(pairs.store, pairs.paths, range(len(pairs.paths)), Preprocess.of(model))
    look = (digest(model, "image"), digest(model, "text"), tokenizer.facts(), content, texts,
            model.pixels, args.max_text, run.precision)
    known = {"key": hashlib.sha256(repr(look).encode("utf-8", "surrogatepass")).hexdigest(),
             "paths": pairs.paths, "texts": texts,
             "relevant": task.relevant.tolist() if task else []}
    about, files = folder / "metadata.json", [folder / "img_emb.npy", folder / "text_emb.npy"]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        if json.loads(about.read_text("utf-8"))["key"] == known["key"]:
            return (*(torch.from_numpy(np.load(file)) for file in files), known)
    image, positions = encode_images(run, model, images, workers=args.workers)
    if lost := int((positions < 0).sum()):
        run.say(f"{pairs.name}: {lost} images cannot be read and are not found")
    text = encode_texts(run, model, tokenizer, texts, args.max_text) if texts else image[:0]
    for file, rows in zip(files, (image, text)):
        write_whole(file, functools.partial(np.save, arr=rows.numpy()))
    write_atomic(about, known)  # last: it says that the others are whole
    return image, text, known


def write_clip_retrieval(folder, found):
    """Embeddings as clip-retrieval reads them: line i of each file is an image with one text, or,
    where no set has texts, an image alone."""
    images, texts, lines = [], [], []
    with_text = any(known["texts"] for _, _, known in found.values())
    for name, (image, text, known) in found.items():
        first = {i: t for t, i in reversed(known["relevant"])}
        for i in sorted(first) if with_text else range(len(image)):
            if image[i].isnan().any():
                continue  # it cannot be read
            images.append(image[i])
            line = {"image_path": known["paths"][i], "set": name}
            if with_text:
                texts.append(text[first[i]])
                line["caption"] = known["texts"][first[i]]
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    for part, rows in (("img_emb", images), ("text_emb", texts)):
        if rows:
            write_whole(folder / part / f"{part}_0.npy",
                        functools.partial(np.save, arr=torch.stack(rows).numpy()))
    write_atomic(folder / "metadata" / "metadata_0.jsonl", "".join(lines))


# -----------------------------------------------------------------------------
# The search

def read_queries(asked):
    """The words of --query -> list of texts and paths of pictures."""
    queries = []
    for query in asked:
        path = expanded(query)
        text = read_text(path) if path.suffix == ".txt" else query
        queries += [line for line in text.splitlines() if line.strip()]
    if not queries:
        raise UserError("--query: expected words, a picture, or a .txt file with a query per line")
    for query in filter(is_image, queries):
        read_image(expanded(query))
    return queries


@torch.no_grad()
def ask(run, model, tokenizer, query, args):
    """Unit features (1, D) of a text or a picture."""
    if not is_image(query):
        return encode_texts(run, model, tokenizer, [query], args.max_text)
    pixels = Preprocess.of(model)(read_image(expanded(query)))[None]
    with evaluating(model), run.autocast():
        return image_features(run, model, pixels).float().cpu()


def right_places(sets, query):
    """The places, among the images of all sets, of those that have the query as a caption."""
    right, first = set(), 0
    for pairs in sets.values():
        right |= {first + i for i, caption in zip(pairs.owner, pairs.captions)
                  if caption.split() == query.split()}
        first += len(pairs.paths)
    return right


def search(run, rows, sets, queries, folder, args):
    """Ask every row of weights -> what search.json holds."""
    places = [(name, path) for name, pairs in sets.items() for path in pairs.paths]
    known = [right_places(sets, query) for query in queries]
    content = {name: content_of(pairs) for name, pairs in sets.items()}
    answers, precision = [{"query": query, "rows": []} for query in queries], {}
    for label, path in rows:
        model = load(path, activation=args.activation)
        run.say(*(f"{label}: {note}" for note in model.origin["notes"]))
        tokenizer = for_model(model, args.tokenizer)
        model = run.move(model).fuse_attention(run.fused_attention)
        found = {name: features(run, model, tokenizer, pairs, content[name],
                                folder / "embeddings" / label / name, args)
                 for name, pairs in sets.items()}
        if args.clip_retrieval and label == rows[-1][0]:
            write_clip_retrieval(expanded(args.clip_retrieval), found)
        if not queries:
            continue
        asking = torch.cat([ask(run, model, tokenizer, query, args) for query in queries])
        gallery, hits = torch.cat([image for image, _, _ in found.values()]), []
        scores, order = top_k(asking, gallery, max(5, args.top))
        for answer, right, values, best in zip(answers, known, scores.tolist(), order.tolist()):
            if right:
                hits.append([100 * len(right & set(best[:k])) / min(k, len(right)) for k in (1, 5)])
            results = []
            for value, i in zip(values[:args.top], best):
                if value > -1.5:  # else the image cannot be read
                    results.append({"set": places[i][0], "path": places[i][1], "score": value,
                                    "right": i in right if right else None})
            answer["rows"].append({"row": label, "results": results})
            run.say(f"{answer['query']} | {label}: {in_words(results[:5])}")
        if hits:
            p1, p5 = np.mean(hits, axis=0).tolist()
            precision[label] = {"p1": p1, "p5": p5}
            run.say(f"{label}: P@1 {p1:.1f}, P@5 {p5:.1f}")
    return {"precision": precision, "queries": answers}


def in_words(results):
    return ", ".join(f"{one['set']}: {one['path']} {one['score']:.3f}" for one in results)


# -----------------------------------------------------------------------------
# Sheets and the page

@functools.cache
def font_for(text, given):
    """A font that has every letter of `text`, or None: Pillow's own, --font, or one installed."""
    for file in (None, *([expanded(given)] if given else FONTS)):
        with contextlib.suppress(OSError):  # Pillow looks where the system keeps its fonts
            font = ImageFont.truetype(file, 14) if file else ImageFont.load_default(14)
            letters = [font.getmask(letter) for letter in "\U0010fffd" + "".join(text.split())]
            nothing, *drawn = [(mask.size, bytes(mask)) for mask in letters]
            if nothing not in drawn:  # the box that stands for a letter it does not have
                return font
    return None


def draw_sheet(number, answer, sets, given):
    """A line of pictures for every row of weights, framed by what is known of them."""
    rows, line, small = answer["rows"], TILE + 20, font_for("0", None)
    wide = max(4, *(len(row["results"]) for row in rows))
    sheet = Image.new("RGB", (LABEL + wide * TILE, 34 + line * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)

    def write(y, text, instead):
        font = font_for(text, given)
        pen.text((8, y), text if font else instead, "black", font or small)
    write(8, answer["query"], f"query {number}")
    for i, row in enumerate(rows):
        y = 34 + i * line
        write(y + TILE // 2, row["row"][:18], f"row {i + 1}")
        for x, one in zip(range(LABEL, sheet.width, TILE), row["results"]):
            sheet.paste(FRAMES[one["right"]], (x, y, x + TILE - 6, y + TILE - 6))
            picture = sets[one["set"]].store.image(one["path"])
            sheet.paste(ImageOps.fit(picture, (TILE - 14, TILE - 14)), (x + 4, y + 4))
            pen.text((x + 4, y + TILE - 6), f"{one['score']:.3f}", "black", small)
    return sheet


def write_page(out, found):
    """search.html: every query in its own words, its sheet, and the paths of what it found."""
    precision = [[label, *scores.values()] for label, scores in found["precision"].items()]
    parts = [table(["weights", "P@1 (%)", "P@5 (%)"], precision)] if precision else []
    for number, answer in enumerate(found["queries"], 1):
        parts += [f"<h2>{html.escape(answer['query'])}</h2><img src=search_{number}.png>",
                  table(["weights", "images"], [
                      [row["row"], in_words(row["results"])] for row in answer["rows"]])]
    write_html(out / "search.html", "search", parts)


# -----------------------------------------------------------------------------

def main(args):
    """Search, write what was found -> it."""
    queries, first = read_queries(args.query) if args.query else [], expanded(args.weights[0])
    staged = (first / "plan.json").is_file() and "rows" in read_json(first / "results.json")
    if not (queries or args.embeddings or args.clip_retrieval):
        raise UserError("nothing to do: expected --query, --embeddings or --clip-retrieval")
    if args.split and not args.data:
        raise UserError("--split is of --data; a run's own sets are those that it was tested on")
    if args.font and not expanded(args.font).is_file():
        raise UserError(f"--font {args.font}: there is no such file")
    if not staged and not args.data:
        raise UserError(f"{first} is no finished run of stages; for other weights name what to "
                        f"search with --data")
    out = expanded(args.out or (first if staged else "runs/search"))
    refuse_unusable(out, "--out")
    refuse_unusable(expanded(args.clip_retrieval or out), "--clip-retrieval")
    run = start(args.device, args.precision)
    rows, sets = [(pathlib.Path(path).name, path) for path in args.weights], {}
    if staged:
        rows, sets = rows_of_run(first, args)
    if args.data:
        sets = {pathlib.Path(name).name: open_set(run, name, args) for name in args.data}
    if len(sets) < len(args.data or []) or len(dict(rows)) < len(rows):
        raise UserError("--data, WEIGHTS: each is called by the last part of its path, and two are "
                        "called alike; give a link of another name")
    found = search(run, rows, sets, queries, out, args)
    if queries:
        out = out / "search"
        out.mkdir(parents=True, exist_ok=True)
        for number, answer in enumerate(found["queries"], 1):
            draw_sheet(number, answer, sets, args.font).save(out / f"search_{number}.png")
        write_atomic(out / "search.json", found)
        write_page(out, found)
        unwritten = [query for query in queries if font_for(query, args.font) is None]
        if unwritten:
            run.say(f"no font here can write {unwritten[0]!r}: pictures have its number, "
                    f"search.html the words; --font FILE names one, as NotoSansCJK-Regular.ttc")
        run.say(f"wrote {out}/search.html")
    return found


def get_args(argv=None):
    parser = Parser(prog="python -m tools.search", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("weights", nargs="+", metavar="WEIGHTS", help="a staged run, or weights")
    add("--query", nargs="+", metavar="TEXT", help="words, a picture, or a .txt file")
    add("--data", nargs="+", help="what to search (default: the run's test sets)")
    add("--split", choices=("train", "val", "test"), help="of --data (default: test)")
    add("--data-dir", help="where named data lies (default: the run's own, else data)")
    add("--top", type=whole(1), default=10, help="pictures per query (default: 10)")
    add("--out", help="where to write (default: RUN, or runs/search)")
    add("--embeddings", action="store_true", help="only keep the features")
    add("--clip-retrieval", metavar="FOLDER", help="write the last row's embeddings there")
    add("--font", help="a font file for the titles of pictures")
    add("--tokenizer", help="vocabulary, where the weights have none")
    add("--activation", choices=("quick_gelu", "gelu"), help="where the file does not say it")
    add("--max-text", type=whole(3), help="tokens of a text")
    add_device_flags(add)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
