"""What a plan of stages leaves behind: the matrix, searches, kept features, exports, its report."""
import csv
import dataclasses
import itertools
import json
import math
import pathlib
import random
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from test_report import check_labels, near, opened, pixel

import data
import report
import train_staged
from clip_model import bert_fields, BertConfig, CLIP, CONFIGS, export_checked, load, save
from data import bootstrap, hit_table, read_image, recalls, retrieval_ranks
from device import start
from tokenizer import ChineseTokenizer
from train_staged import between, compare, get_args, main, matrix_text, Target, unit_features

COLOURS = {"红": (220, 40, 40), "绿": (40, 180, 60), "蓝": (50, 80, 230), "黄": (235, 215, 60)}
SHAPES = {"圆": "ellipse", "方": "rectangle", "线": "line"}
PLACES = {"左": (1, 10), "右": (19, 10), "上": (10, 1), "下": (10, 19)}
WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK] 色 的 在 一 个 , a".split(), *COLOURS, *SHAPES, *PLACES]


def picture(colour, shape, place, stream):
    image = Image.new("RGB", (32, 32), tuple(stream.randrange(90, 150) for _ in range(3)))
    x, y = PLACES[place]
    getattr(ImageDraw.Draw(image), SHAPES[shape])((x, y, x + 11, y + 11), fill=COLOURS[colour])
    return image


def pairs(folder, kinds, each, seed):
    """Drawn images of `kinds`, `each` for training and one held out, and a table of captions."""
    folder.mkdir(parents=True)
    stream = random.Random(seed)
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("image", "caption", "split"))
        for i, (kind, split) in enumerate(itertools.product(kinds, ["train"] * each + ["test"])):
            colour, shape, place = kind
            picture(*kind, stream).save(folder / f"{i}.png")
            for words in (f"{colour}色的{shape}在{place}", f"{place},一个{colour}{shape}"):
                out.writerow((f"{i}.png", words, split))
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two themes, and a small Chinese-CLIP with its vocabulary to start from."""
    folder = tmp_path_factory.mktemp("staged")
    pairs(folder / "colours", list(itertools.product(COLOURS, ["圆"], PLACES)), 3, 0)
    pairs(folder / "shapes", list(itertools.product(["蓝"], SHAPES, PLACES)), 3, 1)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", "utf-8")
    torch.manual_seed(0)
    text = BertConfig("bert", len(WORDS), 64, 2, 1, 64, 32, pool="first")
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **bert_fields(text)))
    model.vocabulary = ChineseTokenizer(folder / "vocab.txt", any_vocab=True).vocabulary
    save(model, folder / "start.safetensors")
    return folder


def flags(made, out, *more):
    return [str(word) for word in (
        "--weights", made / "start.safetensors", "--output-dir", out, "--device", "cpu",
        "--workers", 0, "--log-every", 2, "--stage", f"name=colours,data={made}/colours/pairs.csv,"
        "epochs=20,batch_size=16,lr=3e-3,wise=0+0.5+1", "--stage",
        f"name=shapes,data={made}/shapes/pairs.csv,epochs=8,batch_size=12,lr=3e-3", *more)]


@pytest.fixture(scope="module")
def finished(made):
    """A finished plan -> its folder. Its searches: a test text, other words, an image."""
    (made / "asked.txt").write_text("绿色的圆在左\n\n  一个 蓝 的\n", "utf-8")
    main(get_args(flags(made, made / "run", "--query", made / "asked.txt",
                        made / "colours" / "3.png", "--top", 4)))
    return made / "run"


def stored(folder, name="results.json"):
    return json.loads((folder / name).read_text("utf-8"))


def copied(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


# -----------------------------------------------------------------------------
# The matrix

def naive_recall(scores, right, k):
    """% of the rows of `scores` that have one of their right columns among the first k of a stable
    sort: the loop of Chinese-CLIP's evaluation programs. Rows without any do not ask."""
    hits, asking = 0, [q for q in range(len(scores)) if right.get(q)]
    for q in asking:
        order = sorted(range(len(scores[q])), key=lambda g: -scores[q][g])[:k]
        hits += any(g in right[q] for g in order)
    return 100 * hits / len(asking)


@pytest.mark.parametrize("images, texts, silent", [(7, 9, 2), (7, 7, 0), (40, 60, 11)])
def test_the_matrix_counts_as_the_official_programs_do(images, texts, silent):
    draw = np.random.default_rng(images)  # coarse numbers tie; `silent` images have no text
    image = torch.from_numpy(draw.integers(-2, 3, (images, 3))).float()
    text = torch.from_numpy(draw.integers(-2, 3, (texts, 3))).float()
    relevant = torch.tensor([(t, i) for t in range(texts) for i in draw.permutation(
        images - silent)[:draw.integers(1, 3)].tolist()])
    scores = (image @ text.T).tolist()
    by_text, by_image = {}, {}
    for t, i in relevant.tolist():
        by_text.setdefault(t, set()).add(i)
        by_image.setdefault(i, set()).add(t)
    table = hit_table(retrieval_ranks(image, text, relevant), relevant, images)
    found = recalls(table.sum(axis=0))
    for k in (1, 5, 10):
        assert found[f"i2t_r{k}"] == pytest.approx(naive_recall(scores, by_image, k), abs=1e-9)
        assert found[f"t2i_r{k}"] == pytest.approx(naive_recall(
            np.transpose(scores).tolist(), by_text, k), abs=1e-9)
    assert found["t2i_r10"] == 100 or images > 10  # a pool below ten is not refused
    assert found["mean_recall"] == pytest.approx(
        sum(found[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)) / 6)


def test_the_bootstrap_resamples_images_with_their_texts():
    draw = np.random.default_rng(3)
    image, text = (torch.from_numpy(draw.normal(size=(n, 4))).float() for n in (12, 20))
    relevant = torch.tensor([(t, t % 10) for t in range(19)])  # text 19 has none; images 10, 11
    ranks = retrieval_ranks(image, text, relevant)
    table = hit_table(ranks, relevant, 12)
    found, stream = bootstrap(table, 40, seed=5), np.random.RandomState(5)
    rank_of = {way: dict(zip(*(x.tolist() for x in ranks[way]))) for way in ranks}
    units = [([i] if i in rank_of["i2t"] else [], [t for t in range(19) if t % 10 == i])
             for i in range(12)] + [([], [19])]
    for d in range(40):
        sample = [units[u] for u in stream.randint(13, size=13)]
        asked = {"i2t": [i for some, _ in sample for i in some],
                 "t2i": [t for _, some in sample for t in some]}
        for way in asked:
            for k in (1, 5, 10):
                hits = [rank_of[way][q] < k for q in asked[way]]
                assert found[f"{way}_r{k}"][d] == pytest.approx(100 * np.mean(hits))
        assert found["r1"][d] == pytest.approx((found["i2t_r1"][d] + found["t2i_r1"][d]) / 2)


def hand_rows():
    """Three stages and a mixture on four sets, with the numbers of a small story."""
    scores = {"zero-shot": (10, 20, 30, 40), "a": (50, 25, 28, 41), "b": (35, 60, 33, 40),
              "b wise 0.5": (45, 50, 31, 40.5), "c": (30, 55, 70, 36)}
    draw = np.random.default_rng(0)
    return [{"row": label, "stage": label if len(label) == 1 else None, "sets": {
        name: {"r1": float(r1), "images": 9, "mean_recall": float(r1), "spread": r1 + draw.normal(
            size=200), "interval": {"r1": [r1 - 2.0, r1 + 2.0]},
            **dict.fromkeys(data.RECALLS, float(r1))}
        for name, r1 in zip("abcx", some)}} for label, some in scores.items()]


def test_forgetting_and_transfer_have_their_values_by_hand():
    rows = hand_rows()
    found = compare(rows, None, types.SimpleNamespace(lose=1.0))
    assert found["forgetting"] == [
        dict(a=0, b=0, c=0, x=0), dict(a=0, b=0, c=2, x=0), dict(a=15, b=0, c=0, x=1),
        dict(a=20, b=5, c=0, x=5)]
    assert found["backward_transfer"] == pytest.approx(((30 - 50) + (55 - 60)) / 2)
    assert found["forward_transfer"] == pytest.approx(((25 - 20) + (33 - 30)) / 2)
    assert found["recommended"] == {
        "best on a": "a", "best on b": "b", "best on c": "c", "best on x": "a",
        "best on average": "c", "best that loses at most 1 anywhere": "b"}
    assert compare(rows, None, types.SimpleNamespace(lose=5.0))["recommended"][
        "best that loses at most 5 anywhere"] == "c"
    text = matrix_text(rows, found)
    assert "| b | 35.0 [33.0, 37.0] | 60.0 [58.0, 62.0] |" in text
    assert "| forgotten since the best stage | 20.0 | 5.0 | 0.0 | 5.0 |" in text
    assert "backward transfer: -12.5" in text and "forward transfer: +4.0" in text


def test_changes_between_stages_have_paired_intervals():
    rows = hand_rows()
    changes = compare(rows, None, types.SimpleNamespace(lose=1.0))["changes"]
    assert [(c["from"], c["to"]) for c in changes[::4]] == [
        ("zero-shot", "a"), ("a", "b"), ("b", "c")]  # the mixture is no stage
    for change in changes:
        before, after = (next(row for row in rows if row["row"] == change[end])["sets"][
            change["set"]] for end in ("from", "to"))
        gains = sorted((after["spread"] - before["spread"]).tolist())
        low, high = (gains[math.floor(p * 199)] + (p * 199 % 1) * (
            gains[math.floor(p * 199) + 1] - gains[math.floor(p * 199)]) for p in (0.025, 0.975))
        assert change["interval"] == pytest.approx([low, high])
        assert change["clear"] == (low > 0 or high < 0)
        assert change["r1"] == after["r1"] - before["r1"]
    assert {True, False} == {change["clear"] for change in changes}


def test_a_finished_plan_has_its_matrix_and_says_what_it_is_judged_on(finished):
    results = stored(finished)
    rows = {row["row"]: row for row in results["rows"]}
    assert list(rows) == ["zero-shot", "colours", "colours wise 0", "colours wise 0.5",
                          "colours wise 1", "shapes"]
    for row in rows.values():
        assert list(row["sets"]) == ["colours", "shapes"]
        for found in row["sets"].values():
            for key, (low, high) in found["interval"].items():
                assert low <= found[key] <= high
    assert (results["judged_on"], results["r1"]) == ("shapes", rows["shapes"]["sets"]["shapes"][
        "r1"])
    scores = [{name: rows[label]["sets"][name]["r1"] for name in ("colours", "shapes")}
              for label in ("zero-shot", "colours", "shapes")]
    assert scores[1]["colours"] > scores[0]["colours"] + 10  # it learns
    assert results["backward_transfer"] == scores[2]["colours"] - scores[1]["colours"]
    assert results["forward_transfer"] == scores[1]["shapes"] - scores[0]["shapes"]
    assert 0 < results["image_ms"] < 1e4 and 0 < results["text_ms"] < 1e4
    assert f"| shapes | {scores[2]['colours']:.1f} [" in (finished / "matrix.md").read_text("utf-8")


def test_mixtures_of_weights_are_rows_and_their_ends_are_the_stages_ends(finished, made):
    rows = {row["row"]: row["sets"] for row in stored(finished)["rows"]}
    assert rows["colours wise 0"] == rows["zero-shot"]
    assert rows["colours wise 1"] == rows["colours"]
    one, two, half = (load(path).state_dict() for path in (
        made / "start.safetensors", finished / "colours" / "best.safetensors",
        finished / "colours" / "wise0.5.safetensors"))
    for name in one:
        naive = (one[name].double() + two[name].double()) / 2
        assert (half[name].double() - naive).abs().max() <= 1e-7
    for share, end in ((0.0, one), (1.0, two)):
        assert all(torch.equal(x, end[name]) for name, x in between(one, two, share).items())


def test_the_plan_that_is_written_runs_again(finished, tmp_path):
    plan = stored(finished, "plan.json")
    first = plan["stages"][0]
    assert first["data"].endswith("colours/pairs.csv") and "val" not in first
    assert first["wise"] == [0, 0.5, 1] and plan["stages"][1]["from"] == "colours:best"
    again = main(get_args(["--plan", str(finished / "plan.json"), "--output-dir", str(finished)]))
    assert again["rows"] == stored(finished)["rows"]  # nothing was trained


# -----------------------------------------------------------------------------
# Searches

def test_searches_find_what_sorting_finds_and_count_the_right_ones(finished, made):
    found = stored(finished, "queries.json")
    texts = [query["text"] for query in found["queries"]]
    assert texts == ["绿色的圆在左", "一个 蓝 的", str(made / "colours" / "3.png")]
    assert [query["image"] for query in found["queries"]] == [False, False, True]
    tokenizer = ChineseTokenizer(made / "vocab.txt", any_vocab=True)
    model = load(finished / "colours" / "best.safetensors").eval()
    view = data.Preprocess(32, mean=model.image_mean, std=model.image_std, squash=True)
    gallery = [(name, path) for name in ("colours", "shapes") for path in stored(
        finished, "features.json")["sets"][name]["paths"]]
    with torch.no_grad():
        images = model.encode_image(torch.stack([view(read_image(made / name / path))
                                                 for name, path in gallery]), normalize=True)
        asked = torch.cat([model.encode_text(tokenizer(texts[:2], context_length=32),
                                             normalize=True), model.encode_image(
            view(read_image(texts[2]))[None], normalize=True)])
    right = [path for name, path in gallery if name == "colours"][list(
        itertools.product(COLOURS, PLACES)).index(("绿", "左"))]
    for query, scores in zip(found["queries"], (asked @ images.T).tolist()):
        row = next(row for row in query["rows"] if row["row"] == "colours")
        order = sorted(range(len(gallery)), key=lambda i: -scores[i])
        assert [(one["set"], one["path"]) for one in row["results"]] == [
            gallery[i] for i in order[:4]]
        assert [one["score"] for one in row["results"]] == pytest.approx(
            [scores[i] for i in order[:4]], abs=1e-5)
        if query is found["queries"][0]:
            rank = [gallery[i] for i in order].index(("colours", right)) + 1
            assert row["rank"] == rank
            assert [one["right"] for one in row["results"]] == [
                gallery[i] == ("colours", right) for i in order[:4]]
            assert found["precision"]["colours"] == {"p1": 100.0 * (rank == 1),
                                                     "p5": 100.0 * (rank <= 5)}
        else:
            assert row["rank"] is None and {one["right"] for one in row["results"]} == {None}
    alike = found["queries"][2]["rows"][0]["results"][0]
    assert alike["score"] == pytest.approx(1, abs=1e-5) and alike["path"] == "3.png"


@pytest.mark.parametrize("more, said", [
    (["--query", "none.txt"], "expected a file with a query in each line"),
    (["--query", "none.png"], "none.png"), (["--query", "  "], "--query is empty"),
    (["--row", "colours"], "--export"), (["--export", "hf", "--row", "other"],
     "colours wise 0.5, colours wise 1, shapes"), (["--export", "openai"], "no place")])
def test_what_cannot_be_searched_or_exported_is_refused_before_any_work(made, tmp_path, more, said):
    with pytest.raises(Exception) as caught:
        main(get_args(flags(made, tmp_path / "run", *more)))
    assert caught.value.exit_code == 2 and said in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("content, said", [
    (b"a red circle\nno/such.png\n", "such.png"), (b"\n \n", "a query in each line"),
    ("红".encode("gbk"), "in UTF-8")])
def test_every_line_of_a_file_of_queries_is_looked_at_before_any_work(made, tmp_path, content, said):
    (tmp_path / "queries.txt").write_bytes(content)
    with pytest.raises(Exception) as caught:
        main(get_args(flags(made, tmp_path / "run", "--query", str(tmp_path / "queries.txt"))))
    assert caught.value.exit_code == 2 and said in str(caught.value)
    assert not (tmp_path / "run").exists()


# -----------------------------------------------------------------------------
# Features that are kept

@pytest.fixture
def target(made, tmp_path):
    """function () -> (Target of a copy of the shapes, model, run, args), everything read anew."""
    shutil.copytree(made / "shapes", tmp_path / "data")

    def build():
        model = load(made / "start.safetensors").eval()
        args = types.SimpleNamespace(feature_cache=tmp_path / "cache", squash=True, max_text=32,
                                     eval_batch_size=256, worker_timeout=60, workers=0)
        tokenizer = ChineseTokenizer(made / "vocab.txt", any_vocab=True)
        held = data.open_pairs(str(tmp_path / "data" / "pairs.csv"), "test")
        held.source = {}
        run = start("cpu", "fp32")
        return (lambda: Target("t", held, tokenizer, model, args)), model, run, args
    return build


def keys(build, change=lambda model: None):
    """The files that hold a Target's image and text features."""
    construct, model, run, args = build()
    change(model)
    made, towers = construct(), train_staged.digests(model, args)
    return [unit_features(run, model, side, made, towers, args)[1] for side in ("image", "text")]


def test_kept_features_are_found_by_every_pixel_word_and_weight(target, tmp_path):
    first = keys(target)
    assert keys(target) == first and len(list((tmp_path / "cache").glob("*.npy"))) == 2

    def nudge(name):
        def change(model):
            with torch.no_grad():
                x = model.state_dict()[name].view(-1)
                x[0] = torch.nextafter(x[0], torch.tensor(math.inf))
        return change
    image, text = keys(target, nudge("visual.conv1.weight"))
    assert image != first[0] and text == first[1]
    image, text = keys(target, nudge("text_projection"))
    assert image == first[0] and text != first[1]

    def darker(model):
        model.image_mean = (model.image_mean[0] + 1 / 255, *model.image_mean[1:])
    image, text = keys(target, darker)
    assert image != first[0] and text == first[1]
    construct, model, run, args = target()
    args.squash = False  # another way to the same size
    assert unit_features(run, model, "image", construct(), train_staged.digests(model, args),
                         args)[1] != first[0]
    with Image.open(tmp_path / "data" / "3.png") as shown:  # a test image
        changed = shown.copy()
    changed.putpixel((5, 5), tuple(255 - v for v in changed.getpixel((5, 5))))
    changed.save(tmp_path / "data" / "3.png")
    image, text = keys(target)
    assert image != first[0] and text == first[1]
    table = tmp_path / "data" / "pairs.csv"
    table.write_text(table.read_text("utf-8").replace("一个蓝线", "个蓝线"), "utf-8")
    assert keys(target)[0] == image and keys(target)[1] != text


def test_a_second_evaluation_decodes_no_image_and_gives_the_same(finished, made, monkeypatch):
    seen, open_image, rows = [], Image.open, stored(finished)["rows"]

    def spy(*args, **options):
        seen.append(args)
        return open_image(*args, **options)
    monkeypatch.setattr(Image, "open", spy)
    again = main(get_args(flags(made, finished, "--eval-only", "--query", "绿色的圆在左")))
    assert json.loads(json.dumps(again["rows"])) == rows and not seen
    stale = stored(finished, "queries.json")["queries"]
    assert [query["text"] for query in stale] == ["绿色的圆在左"]
    main(get_args(flags(made, finished, "--eval-only", "--no-feature-cache")))
    assert seen and not (finished / "queries.json").exists()  # searches go with their results
    assert json.loads(json.dumps(stored(finished)["rows"])) == rows
    main(get_args(flags(made, finished, "--eval-only", "--query", made / "asked.txt",
                        made / "colours" / "3.png", "--top", 4)))


def test_a_spoilt_file_of_features_is_made_again(finished, made, tmp_path):
    run = copied(finished, tmp_path)
    name = stored(run, "features.json")["files"]["shapes"]["colours"][0]
    whole = (run / "cache" / name).read_bytes()
    (run / "cache" / name).write_bytes(whole[:-3] + b"\x00\x00\x41")
    again = main(get_args(flags(made, run, "--eval-only")))
    assert json.loads(json.dumps(again["rows"]))[-1]["sets"] == stored(finished)["rows"][-1]["sets"]
    assert (run / "cache" / name).read_bytes() == whole


# -----------------------------------------------------------------------------
# Exports

@pytest.mark.parametrize("layout, name", [
    ("safetensors", "clip.safetensors"), ("chinese_clip", "chinese_clip.pt"), ("hf", "hf")])
def test_an_export_is_read_back_and_is_the_row_that_was_asked_for(finished, made, tmp_path, capsys,
                                                                  layout, name):
    run = copied(finished, tmp_path)
    results = main(get_args(flags(made, run, "--eval-only", "--export", layout, "--row",
                                  "colours wise 0.5")))
    assert results["export_difference"] <= 1e-6
    assert "read back, its features differ" in capsys.readouterr().out
    one, two = load(run / "export" / name), load(run / "colours" / "wise0.5.safetensors")
    assert one.config == two.config
    if layout == "hf":  # where transformers looks for it
        assert (run / "export" / "hf" / "vocab.txt").read_text("utf-8").split("\n")[:-1] == WORDS
    else:
        assert one.vocabulary == two.vocabulary
    assert all(torch.equal(x, two.state_dict()[key]) for key, x in one.state_dict().items())


@pytest.mark.parametrize("layout", ["openai", "open_clip", "hf"])
def test_an_english_clip_is_exported_for_its_own_libraries(tmp_path, layout):
    torch.manual_seed(0)
    model = CLIP(CONFIGS["tiny-vit"]).eval()
    tokens = torch.tensor([[49406, 5, 7, 49407] + [0] * 73])
    assert export_checked(model, tmp_path, layout, torch.randn(2, 3, 32, 32), tokens) <= 1e-6


def test_an_onnx_file_takes_any_number_of_rows(made, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = load(made / "start.safetensors").eval()
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(5, 20, (3, 32))
    assert export_checked(model, tmp_path, "onnx", images, tokens) <= 1e-4
    for side, encode in (("image", model.encode_image), ("text", model.encode_text)):
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / f"{side}.onnx"),
                                               providers=["CPUExecutionProvider"])
        for rows in (1, 5):
            x = {"image": torch.randn(rows, 3, 32, 32),
                 "text": torch.randint(5, 20, (rows, 32))}[side]
            with torch.no_grad():
                far = encode(x) - torch.from_numpy(session.run(None, {side: x.numpy()})[0])
            assert far.abs().max() <= 1e-4


def test_features_are_laid_out_as_clip_retrieval_has_them(finished, made, tmp_path):
    run = copied(finished, tmp_path)
    main(get_args(flags(made, run, "--eval-only", "--export", "clip-retrieval", "--row", "shapes")))
    image, text = (np.load(run / "export" / name / f"{name}_0.npy")
                   for name in ("img_emb", "text_emb"))
    about = [json.loads(line) for line in (run / "export" / "metadata" / "metadata_0.jsonl")
             .read_text("utf-8").splitlines()]
    assert len(image) == len(text) == len(about) == 16 + 12  # a line is an image with a text of its
    kept = stored(run, "features.json")
    for row, one, two in zip(about, image, text):
        of, files = kept["sets"][row["set"]], kept["files"]["shapes"][row["set"]]
        i = of["paths"].index(row["image_path"])
        assert np.array_equal(one, np.load(run / "cache" / files[0])[i])
        t = min(t for t, j in of["relevant"] if j == i)
        assert of["texts"][t] == row["caption"]
        assert np.array_equal(two, np.load(run / "cache" / files[1])[t])


# -----------------------------------------------------------------------------
# What the maps rest on

def blobs(n, dim, centres, seed=0):
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % centres
    return (draw.normal(size=(centres, dim)) * 4)[labels] + draw.normal(size=(n, dim)), labels


def test_pca_is_the_leading_eigenvectors_of_the_covariance():
    x, _ = blobs(60, 7, 3)
    found, centred = report.pca(x), x - x.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    naive = centred @ vectors[:, ::-1][:, :2]
    left, s, _ = np.linalg.svd(centred, full_matrices=False)
    for k in range(2):
        for twin in (naive[:, k], left[:, k] * s[k]):
            assert min(np.abs(found[:, k] - twin).max(), np.abs(found[:, k] + twin).max()) < 1e-9
    assert np.allclose(report.pca(x[:, ::-1]), found)  # the sign does not hang on the order


def naive_affinities(x, perplexity):
    n, p = len(x), np.zeros((len(x), len(x)))
    for i in range(n):
        far = [sum((a - b) ** 2 for a, b in zip(x[i], x[j])) for j in range(n)]
        low, high = 1e-12, 1e12
        for _ in range(300):
            beta = math.sqrt(low * high)
            row = [0.0 if j == i else math.exp(-beta * (far[j] - min(
                f for k, f in enumerate(far) if k != i))) for j in range(n)]
            row = [v / sum(row) for v in row]
            entropy = -sum(v * math.log(v) for v in row if v > 0)
            low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
        p[i] = row
    return (p + p.T) / (2 * n)


def naive_tsne(x, perplexity, steps):
    """t-SNE in loops: the gradient is eq. 5 of the paper, the updates those of its appendix."""
    p, n = np.maximum(naive_affinities(x, perplexity), 1e-12), len(x)
    y = report.pca(x)
    y = y / y[:, 0].std(ddof=1) * 1e-4
    speed, gain, rate = np.zeros_like(y), np.ones_like(y), max(n / 48, 50)
    for step in range(steps):
        near = np.zeros((n, n))
        for i, j in itertools.permutations(range(n), 2):
            near[i, j] = 1 / (1 + sum((y[i] - y[j]) ** 2))
        q, slope = near / near.sum(), np.zeros_like(y)
        for i, j in itertools.permutations(range(n), 2):
            share = p[i, j] * (12 if step < 250 else 1) - q[i, j]
            slope[i] += 4 * share * (y[i] - y[j]) * near[i, j]
        for i, c in itertools.product(range(n), range(2)):
            up = (slope[i, c] > 0) != (speed[i, c] > 0)
            gain[i, c] = max(0.01, gain[i, c] + 0.2 if up else gain[i, c] * 0.8)
            speed[i, c] = (0.5 if step < 250 else 0.8) * speed[i, c] - rate * gain[i, c] * slope[
                i, c]
        y = y + speed
    return y - y.mean(axis=0)


def test_neighbour_probabilities_have_the_perplexity_asked_for():
    x, _ = blobs(14, 3, 2)
    x[3] = x[5]  # a double
    found = report.affinities(torch.from_numpy(x), 4.0).numpy()
    assert np.abs(found - np.maximum(naive_affinities(x, 4.0), 1e-12)).max() < 1e-9
    assert np.array_equal(found, found.T) and found.sum() == pytest.approx(1)


@pytest.mark.parametrize("steps", [1, 30])
def test_tsne_takes_the_steps_of_its_definition(steps):
    x, _ = blobs(9, 4, 2)
    found, _ = report.tsne(x, 30.0, steps)  # a perplexity beyond (n - 1) / 3 is lowered to it
    twin = naive_tsne(x, 8 / 3, steps)
    assert np.abs(found - twin).max() <= 1e-5 * np.abs(twin).max()


def test_tsne_is_as_good_as_sklearns():
    manifold = pytest.importorskip("sklearn.manifold", reason="scikit-learn is not installed")
    x, labels = blobs(300, 10, 5)
    found, left = report.tsne(x)
    theirs = manifold.TSNE(method="exact", init="pca", random_state=0, max_iter=750).fit(x)
    assert left <= 1.02 * theirs.kl_divergence_
    p = report.affinities(torch.from_numpy(x), 30.0).numpy()  # and it is what it says it is
    q = 1 / (1 + ((found[:, None] - found) ** 2).sum(axis=2)) * (1 - np.eye(300))
    assert left == pytest.approx((p * np.log(p / np.maximum(q / q.sum(), 1e-12))).sum(), rel=1e-9)
    assert report.silhouette(found, labels) > 0.5


def test_silhouette_and_neighbours_equal_their_loops():
    x, labels = blobs(40, 3, 4)
    x, labels = x / np.linalg.norm(x, axis=1, keepdims=True), labels.copy()
    labels[7] = 9  # a label alone
    near, found = [], []
    for i in range(40):
        far = [math.dist(x[i], x[j]) for j in range(40)]
        order = sorted((j for j in range(40) if j != i), key=lambda j: far[j])[:10]
        near.append(sum(labels[j] == labels[i] for j in order) / 10)
        own = [far[j] for j in range(40) if j != i and labels[j] == labels[i]]
        other = min(np.mean([far[j] for j in range(40) if labels[j] == label])
                    for label in set(labels) - {labels[i]})
        found.append((other - np.mean(own)) / max(other, np.mean(own)) if own else 0)
    assert report.neighbours_agree(x, labels) == pytest.approx(100 * np.mean(near))
    assert report.silhouette(x, labels) == pytest.approx(np.mean(found), abs=1e-6)
    with_sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    assert report.silhouette(x, labels) == pytest.approx(with_sklearn.silhouette_score(x, labels))


def test_pairs_apart_is_the_share_of_other_texts_that_are_further():
    draw = np.random.default_rng(0)
    images, texts = (draw.integers(-2, 3, (12, 3)).astype(float) for _ in range(2))
    scores, shares = images @ texts.T, []
    for i, j in itertools.permutations(range(12), 2):
        shares.append(1.0 if scores[i, j] < scores[i, i] else 0.5 * (scores[i, j] == scores[i, i]))
    assert report.pairs_apart(images, texts) == pytest.approx(100 * np.mean(shares))


def test_the_first_right_rank_is_that_of_a_stable_sort():
    draw = np.random.default_rng(1)
    for _ in range(200):
        scores = draw.integers(0, 4, 9).astype(float)
        right = set(draw.permutation(9)[:draw.integers(1, 4)].tolist())
        order = sorted(range(9), key=lambda i: -scores[i])
        assert report.first_right(scores, right) == min(order.index(i) for i in right)


# -----------------------------------------------------------------------------
# The page

def grid():
    """Two rows of weights with three known results each, all images of one colour."""
    paint = {"a.png": (250, 250, 0), "b.png": (0, 250, 250), "c.png": (250, 0, 250)}
    rows = [{"row": "zero-shot", "results": [("a.png", False), ("b.png", True), ("c.png", False)]},
            {"row": "own", "results": [("b.png", True), ("c.png", False), ("a.png", None)]}]
    for row in rows:
        row["results"] = [{"set": "s", "path": path, "score": 0.5, "right": right}
                          for path, right in row["results"]]
    return {"text": "something yellow", "rows": rows}, paint


def test_a_search_has_a_tile_for_each_row_and_rank_framed_by_what_is_right():
    query, paint = grid()
    canvas = report.draw_search(query, 1, lambda name, path: Image.new("RGB", (40, 20), paint[
        path]), report.Fonts())
    check_labels(canvas)
    image = opened(canvas)
    frames = {True: report.RIGHT, False: report.WRONG, None: report.UNKNOWN}
    for i, row in enumerate(query["rows"]):
        for k, one in enumerate(row["results"]):
            x, y = report.SIDE + report.TILE * k, report.HEAD + (report.TILE + 14) * i
            side = report.TILE - 6
            half, end = side / 2, side - 1.5
            for at in ((1, half), (end, half), (half, 1), (half, end)):
                assert near(pixel(image, x + at[0], y + at[1]), frames[one["right"]], 12)
            for at in ((6, 6), (side - 7, side - 7), (side / 2, side / 2)):
                assert near(pixel(image, x + at[0], y + at[1]), paint[one["path"]], 12)
            assert pixel(image, x + side + 3, y + side / 2) == report.WHITE
    texts = [text for text, *_ in canvas.boxes]
    assert texts.count("0.500") == 6 and {"1", "2", "3", "zero-shot", "own", "right"} <= {*texts}


def test_a_search_without_its_images_shows_their_names_and_one_by_likeness_its_picture():
    query, paint = grid()
    canvas = report.draw_search(query, 1, lambda name, path: None, report.Fonts())
    check_labels(canvas)
    assert [text for text, *_ in canvas.boxes].count("b.png") == 2
    query.update(image=True, text="x.png")
    canvas = report.draw_search(query, 1, lambda name, path: Image.new("RGB", (9, 9), (
        (9, 9, 9) if name is None else paint[path])), report.Fonts())
    check_labels(canvas)
    assert near(pixel(opened(canvas), 30, report.HEAD + 30), (9, 9, 9), 12)


def written(folder, names=("muge", "own"), wise=" wise 0.5"):
    """A finished plan written by hand: two sets of 14 images and 16 texts, random features."""
    (folder / "cache").mkdir(parents=True)
    draw, rows = np.random.default_rng(0), ["zero-shot", names[0], names[0] + wise, names[1]]
    files = {row: {name: [f"{r}_{s}_{side}.npy" for side in (0, 1)] for s, name in enumerate(names)}
             for r, row in enumerate(rows)}
    for row in files:
        for pair in files[row].values():
            for file, n in zip(pair, (14, 16)):
                x = draw.normal(size=(n, 6))
                np.save(folder / "cache" / file, (x / np.linalg.norm(x, axis=1, keepdims=True))
                        .astype(np.float32))
    found = {"images": 14, "gap": 0.5, "scale": 14.0}
    recall = {key: 40.0 for key in (*data.RECALLS, "mean_recall", "r1")}
    table = [{"row": row, "stage": row if row in names else None, "sets": {name: {
        **recall, **found, "r1": 40.0 + 7 * r - 3 * s, "interval": {"r1": [30.0, 50.0]}}
        for s, name in enumerate(names)}} for r, row in enumerate(rows)]
    lost = dict.fromkeys(names, 0.0)
    contents = {
        "results.json": {"method": "staged", "data": "x", "model": "tiny", "rows": table,
                         "forgetting": [lost] * 3, "backward_transfer": -1.0,
                         "forward_transfer": 2.0, "recommended": {"best on average": names[1]},
                         "changes": [{"from": "zero-shot", "to": names[0], "set": names[0],
                                      "r1": 7.0, "interval": [1.0, 13.0], "clear": True}]},
        "plan.json": {"stages": [{"name": name, "from": "init", "data": "x"} for name in names]},
        "features.json": {"rows": rows, "seed": 1, "files": files, "sets": {name: {
            "source": {"name_or_path": "nowhere", "split": "test", "data_dir": "data"},
            "paths": [f"{i}.jpg" for i in range(14)], "relevant": [[t, t % 14] for t in range(16)],
            "texts": [f"{name} <{t}> 材料" for t in range(16)]} for name in names}},
        "queries.json": {"precision": {row: {"p1": 0.0, "p5": 100.0} for row in rows}, "queries": [
            {"text": "黑色碳纤维材料表面", "image": False, "right": [], "rows": [
                {"row": row, "rank": 4, "results": [{
                    "set": names[0], "path": "3.jpg", "score": 0.25, "right": True}]}
                for row in rows]}]}}
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def page_of(folder, *more):
    assert report.main([str(folder), *map(str, more)]) == 0
    return (folder / "report" / "report.html").read_text("utf-8")


@pytest.fixture
def canvases(monkeypatch):
    """Every canvas that reaches a page."""
    seen, figure = {}, report.Page.figure

    def spy(page, name, canvas, alt, **options):
        seen[name] = canvas
        return figure(page, name, canvas, alt, **options)
    monkeypatch.setattr(report.Page, "figure", spy)
    return seen


def test_the_page_of_a_finished_plan_has_every_section(finished, canvases):
    page = page_of(finished)
    for title in ("What each stage learned and forgot", "The stages", "All recalls (%)",
                  "Forgetting and transfer", "Changes from stage to stage", "Stage shapes",
                  "Which weights to take", "Searches", "Texts that gained and lost most",
                  "Images that gained and lost most", "Where shapes is surest of another image",
                  "Maps of the embeddings"):
        assert f"<h2>{title}</h2>" in page, title
    assert "left out" not in page  # every image was found
    assert {"matrix.png", "search_1.png", "search_3.png", "case_1.png", "map_pca.png",
            "map_tsne.png", "curves_colours.png"} <= set(canvases)
    for name, canvas in canvases.items():
        if canvas is None:
            continue
        check_labels(canvas)
        with Image.open(finished / "report" / name) as image:
            assert image.format == "PNG" and min(image.size) > 50
    assert "绿色的圆在左" in page and "<script" not in page and "https:" not in page
    with open(finished / "report" / "map.csv", encoding="utf-8", newline="") as file:
        points = list(csv.DictReader(file))
    assert len(points) == 3 * 2 * (16 + 12)  # rows that are stages, images and texts, pairs
    assert {row["weights"] for row in points} == {"zero-shot", "colours", "shapes"}
    assert all(math.isfinite(float(row[key])) for row in points for key in ("pca_x", "tsne_y"))
    texts = {text for text, *_ in canvases["search_1.png"].boxes}
    assert "search 1" in texts or "绿色的圆在左" in texts  # by the fonts that are here


def test_the_same_plan_gives_the_same_page(tmp_path):
    run = written(tmp_path / "run")
    one = page_of(run)
    assert page_of(run) == one


def test_names_no_font_can_write_are_numbered_in_figures_and_named_in_the_page(
        tmp_path, canvases, monkeypatch):
    monkeypatch.setattr(report, "SYSTEM", ())
    page = page_of(written(tmp_path / "run", ("淘宝", "材料")))
    for canvas in filter(None, canvases.values()):
        check_labels(canvas)
        assert not any("?" in text for text, *_ in canvas.boxes)
    assert {"set 1", "set 2", "row 2", "row 4"} <= {t for t, *_ in canvases["matrix.png"].boxes}
    assert {"search 1", "row 2"} <= {text for text, *_ in canvases["search_1.png"].boxes}
    assert "no font here can write 淘宝: it is set 1 in the figures" in page
    assert "no font here can write 材料: it is row 4 in the figures" in page
    assert "黑色碳纤维材料表面" in page and "材料 &lt;3&gt; 材料" in page


def test_a_font_that_is_given_writes_the_names(tmp_path, canvases, monkeypatch):
    monkeypatch.setattr(report, "SYSTEM", ())
    try:
        from PIL import ImageFont
        path = ImageFont.truetype("DejaVuSans.ttf", 12).path
    except OSError:
        pytest.skip("there is no DejaVuSans.ttf here to give")
    name, fonts = "ქართული", report.Fonts()
    if fonts.source(name) is not False or report.Fonts(path).source(name) is False:
        pytest.skip("the fonts here do not differ in Georgian")
    run = written(tmp_path / "run", (name, "own"))
    assert "no font here can write" in page_of(run)
    assert "no font here can write" not in page_of(run, "--font", path)
    assert name in {text for text, *_ in canvases["matrix.png"].boxes}
    check_labels(canvases["matrix.png"])


@pytest.mark.parametrize("names", [("m" * 40, "W" * 40), ("a", "b")], ids=["long", "short"])
def test_labels_of_stages_fit_whatever_their_names(tmp_path, canvases, names):
    page_of(written(tmp_path / "run", names))
    for canvas in filter(None, canvases.values()):
        check_labels(canvas)


@pytest.mark.parametrize("sets", [1, 9])
def test_the_matrix_is_coloured_by_the_change_and_framed_where_a_stage_trained(sets):
    names = [f"set{i}" for i in range(sets)]
    rows = [{"row": row, "stage": stage, "sets": {name: {"r1": r1, "interval": {"r1": [
        r1 - 1, r1 + 1]}} for name in names}}
        for row, stage, r1 in (("zero-shot", None, 40.0), ("set0", "set0", 55.0),
                               ("other", "other", 25.0))]
    canvas = report.draw_matrix(rows, report.Fonts())
    check_labels(canvas)
    image, box = opened(canvas), {text: (x0, y0) for text, x0, y0, _, _ in canvas.boxes[::-1]}
    (_, same), (_, up), (_, down) = (box[text] for text in ("40.0", "55.0", "25.0"))
    plain, green, red = (pixel(image, 222, y) for y in (same, up, down))
    assert plain == report.WHITE and green[1] > green[0] + 40 and red[0] > red[2] + 40
    wide = max(90, min(150, 700 / sets))
    assert near(pixel(image, 210.5, up), report.INK, 30)
    assert not near(pixel(image, 210.5, down), report.INK, 30)
    assert sets == 1 or not near(pixel(image, 210.5 + wide, up), report.INK, 30)


def test_texts_that_rose_and_fell_are_found_and_so_are_doubtful_labels(tmp_path):
    """Unit vectors: text 0 finds its image only in the last row, text 1 only in the first; text 2
    is sure of image 3 in the last."""
    run = written(tmp_path / "run", ("a", "b"))
    eye, kept = np.eye(14, dtype=np.float32), stored(run, "features.json")
    texts = np.concatenate([eye, eye[:2]])
    first, last = texts.copy(), texts.copy()
    first[0], last[1], last[2] = -eye[0], -eye[1], eye[3]
    for row, text in (("zero-shot", first), ("a", texts), ("b", last)):
        for name, asked in (("a", text), ("b", texts)):
            for file, x in zip(kept["files"][row][name], (eye, asked)):
                np.save(run / "cache" / file, x)
    queries, doubtful = report.cases(kept, run / "cache")
    mine = [query for query in queries if query["set"] == "a"]
    assert [query["text"] for query in mine] == [f"a <{t}> 材料" for t in (0, 1, 2)]
    assert mine[0]["ranks"] == {"zero-shot": 14, "a": 1, "b": 1}
    assert mine[1]["ranks"] == {"zero-shot": 1, "a": 1, "b": 14}
    assert [row["row"] for row in mine[0]["rows"]] == ["zero-shot", "a", "b"]
    assert [one["right"] for one in mine[0]["rows"][2]["results"]] == [True] + [False] * 7
    assert doubtful[0] == ("a", "a <1> 材料", "1.jpg", "0.jpg", 1.0)
    assert doubtful[1] == ("a", "a <2> 材料", "2.jpg", "3.jpg", 1.0)
    images = [found for found in report.image_cases(kept, run / "cache") if found[0] == "a"]
    two = next(found for found in images if found[1] == "2.jpg")  # of equal texts the first
    assert two[2:] == ["a <2> 材料", "a <2> 材料", 1, "a <0> 材料", 3]
    eye[5] = np.nan  # an image that could not be read
    np.save(run / "cache" / kept["files"]["b"]["a"][0], eye)
    assert all(one["path"] != "5.jpg" for query in report.cases(kept, run / "cache")[0][:2]
               for one in query["rows"][2]["results"])
    assert ("a", "5.jpg", "a <5> 材料") not in report.sample_points(kept, run / "cache")[1]


def test_a_plan_without_features_or_images_still_has_its_page(tmp_path):
    run = written(tmp_path / "run")
    page = page_of(run)
    assert "images of muge are left out: " in page and "--data-dir" in page
    kept = stored(run, "features.json")
    (run / "cache" / kept["files"]["own"]["own"][0]).write_bytes(b"spoilt")
    page = page_of(run)
    assert "cases or maps are left out" in page and "<h2>Searches</h2>" in page
    (run / "features.json").write_text(json.dumps({**kept, "files": None}), "utf-8")
    page = page_of(run)
    assert "--no-feature-cache" in page and "<h2>Searches</h2>" in page
    (run / "features.json").unlink()
    page = page_of(run)
    assert "no features.json" in page and "What each stage learned and forgot" in page
