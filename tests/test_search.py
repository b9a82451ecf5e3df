"""tools.search: what is found, kept features, sheets and titles, embeddings, refusals."""
import json

import helpers
import numpy as np
import pytest
import torch
from helpers import attempt, refused, run_main
from PIL import Image

import weights
from clip_model import bert_fields, BertConfig
from data import normalise, Preprocess, read_image
from pairs import open_pairs
from tokenizer import for_model, WordPieceTokenizer
from tools import search

TOOL = "tools.search"
WORDS = [*helpers.WORDS, *"红绿圆在左"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A staged run of one step on drawn pictures that lie beside it, one captioned in Chinese."""
    folder = tmp_path_factory.mktemp("search")
    data = helpers.scenes(folder / "pairs", 24, 12)
    table = (data / "pairs.csv").read_text("utf-8")
    (data / "pairs.csv").write_text(table.replace(table.splitlines()[-1].split(",", 1)[1].rsplit(
        ",", 1)[0], "红圆在左"), "utf-8")
    (data / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    text = BertConfig("bert", len(WORDS), 32, 2, 2, 64, 64)
    model = helpers.tiny_clip(embed_dim=16, **bert_fields(text))
    model.vocabulary = WordPieceTokenizer(data / "vocab.txt").facts()
    weights.save(model, folder / "start.safetensors")
    run_main("train_staged", "--data", "pairs", "--data-dir", folder, "--epochs", 1, "--lr", 1e-3,
             "--weights", folder / "start.safetensors", "--batch-size", 12, "--workers", 0,
             "--output-dir", folder / "run")
    return folder / "run"


def found_by_hand(run, queries):
    """Cosines of the last row's features, one by one: {query: {path: cosine}}."""
    model = weights.load(run / "tuned" / "checkpoint_best.pt")
    pairs, view = open_pairs(run.parent / "pairs", "test"), Preprocess.of(model)
    tokenize, found = for_model(model), {}
    with torch.no_grad():
        def encode(picture):
            pixels = normalise(view(picture)[None], model.image_mean, model.image_std)
            return model.encode_image(pixels, normalize=True)[0]
        images = {path: encode(pairs.store.image(path)) for path in pairs.paths}
        for query in queries:
            asking = encode(read_image(query)) if str(query).endswith(".png") else (
                model.encode_text(tokenize([query], context_length=64), normalize=True)[0])
            found[str(query)] = {path: float(asking @ x) for path, x in images.items()}
    return pairs, found


def test_a_search_finds_what_sorting_finds_and_counts_the_right_ones(world, tmp_path):
    picture = world.parent / "pairs" / "30.png"
    (tmp_path / "queries.txt").write_text("a red circle at the top\n\n红圆在左\n", "utf-8")
    found = run_main(TOOL, world, "--query", tmp_path / "queries.txt", picture, "--top", 4)
    assert found == json.loads((world / "search" / "search.json").read_text("utf-8"))
    queries = ["a red circle at the top", "红圆在左", str(picture)]
    pairs, cosines = found_by_hand(world, queries)
    assert [answer["query"] for answer in found["queries"]] == queries
    for answer in found["queries"]:
        assert [row["row"] for row in answer["rows"]] == ["before", "tuned"]
        results, scores = answer["rows"][1]["results"], cosines[answer["query"]]
        assert [one["path"] for one in results] == sorted(
            pairs.paths, key=lambda path: -scores[path])[:4]
        assert [one["score"] for one in results] == pytest.approx(
            [scores[one["path"]] for one in results], abs=1e-5)
    assert found["queries"][2]["rows"][1]["results"][0]["path"] == "30.png"
    right = pairs.paths[pairs.owner[pairs.captions.index("红圆在左")]]
    ordered = sorted(pairs.paths, key=lambda path: -cosines["红圆在左"][path])
    assert found["precision"]["tuned"] == {f"p{k}": 100.0 * (right in ordered[:k]) for k in (1, 5)}
    marks = [one["right"] for one in found["queries"][1]["rows"][1]["results"]]
    assert marks == [path == right for path in ordered[:4]]


def test_precision_is_of_as_many_as_could_be_right(world, tmp_path):
    """A caption that three images share: P@1 of one, P@5 of three."""
    data = world.parent / "pairs"
    rows = ["image,caption,split", *(f"{data}/{i}.png,{'red' if i < 27 else 'blue'},test"
                                     for i in range(24, 36))]
    (tmp_path / "own.csv").write_text("\n".join(rows))
    found = run_main(TOOL, world, "--data", tmp_path / "own.csv", "--query", "red", "--out",
                     tmp_path, "--top", 12)
    for row in found["queries"][0]["rows"]:
        right = [one["right"] for one in row["results"]]
        assert sum(right) == 3 and len(right) == 12
        assert found["precision"][row["row"]] == pytest.approx(
            {"p1": 100 * right[0], "p5": 100 * sum(right[:5]) / 3})


def test_kept_features_are_found_by_every_pixel_word_and_weight(world, tmp_path):
    """Each change writes them anew, once."""
    folder = helpers.scenes(tmp_path / "pairs", 2, 6)
    (folder / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    start, words = tmp_path / "start.safetensors", tmp_path / "other.txt"
    start.write_bytes((world.parent / "start.safetensors").read_bytes())
    words.write_text("\n".join([*WORDS[:4], *reversed(WORDS[4:])]), "utf-8")
    file = tmp_path / "embeddings" / "start.safetensors" / "pairs" / "img_emb.npy"
    table = folder / "pairs.csv"

    def written(*more):
        before = file.stat().st_mtime_ns if file.exists() else 0
        run_main(TOOL, start, "--data", folder, "--split", "val", "--embeddings", "--out", tmp_path,
                 *more)
        return file.stat().st_mtime_ns != before

    def pixel():
        with Image.open(folder / "5.png") as shown:
            changed = shown.convert("RGB")
        changed.putpixel((5, 5), tuple(255 - v for v in changed.getpixel((5, 5))))
        changed.save(folder / "5.png")
    for change in (lambda: None, pixel,
                   lambda: table.write_text(table.read_text().replace("5.png,a ", "5.png,one ")),
                   lambda: weights.save(helpers.perturb(weights.load(start), by=1e-6), start),
                   lambda: file.write_bytes(file.read_bytes()[:-9])):
        change()
        assert (written(), written()) == (True, False)
    assert written("--tokenizer", words) and not written("--tokenizer", words)
    assert len(np.load(file)) == 6


def test_features_are_laid_out_as_clip_retrieval_has_them(world, tmp_path):
    run_main(TOOL, world, "--clip-retrieval", tmp_path)
    image, text = (np.load(tmp_path / name / f"{name}_0.npy") for name in ("img_emb", "text_emb"))
    lines = (tmp_path / "metadata" / "metadata_0.jsonl").read_text("utf-8").splitlines()
    kept = world / "embeddings" / "tuned" / "tuned"
    about = json.loads((kept / "metadata.json").read_text("utf-8"))
    assert len(image) == len(text) == len(lines) == 12
    for line, one, two in zip(map(json.loads, lines), image, text):
        i = about["paths"].index(line["image_path"])
        t = min(t for t, j in about["relevant"] if j == i)
        assert line["caption"] == about["texts"][t]
        assert np.array_equal(one, np.load(kept / "img_emb.npy")[i])
        assert np.array_equal(two, np.load(kept / "text_emb.npy")[t])


def test_a_folder_of_images_and_any_weights(world, tmp_path):
    for i in range(3):
        helpers.save_picture(tmp_path / "photos" / f"{i}.png", helpers.noise(seed=i))
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    found = run_main(TOOL, world.parent / "start.safetensors", "--data", tmp_path / "photos",
                     "--query", tmp_path / "photos" / "1.png", "--out", tmp_path,
                     "--clip-retrieval", tmp_path / "kept")
    assert len(np.load(tmp_path / "kept" / "img_emb" / "img_emb_0.npy")) == 3
    results = found["queries"][0]["rows"][0]["results"]
    assert results[0]["path"] == "1.png" and results[0]["score"] == pytest.approx(1, abs=1e-5)
    assert len(results) == 3 and {one["right"] for one in results} == {None}


def test_a_title_that_no_font_writes_is_said_and_stands_in_the_page(world, tmp_path, monkeypatch,
                                                                   capsys):
    monkeypatch.setattr(search, "FONTS", ())
    search.font_for.cache_clear()
    run_main(TOOL, world, "--query", "черный кот", "a red circle", "--out", tmp_path)
    search.font_for.cache_clear()
    said = capsys.readouterr().out
    assert "--font" in said and said.count("no font here") == 1
    assert "черный кот" in (tmp_path / "search" / "search.html").read_text("utf-8")


@pytest.mark.parametrize("more, name", [
    ([], "--query"), (["--query", "none.txt"], "none.txt"), (["--query", "none.png"], "none.png"),
    (["--query", "  "], "--query"), (["--query", "x", "--split", "train"], "--split"),
    (["--query", "x", "--top", 0], "--top"),
    (["--query", "x", "--data", "no/such"], "no/such"), (["--qery", "x"], "--query"),
    (["--query", "x", "--font", "no.ttf"], "--font"), (["--query", "gbk.txt"], "UTF-8")])
def test_what_cannot_be_searched_is_refused(world, tmp_path, monkeypatch, more, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gbk.txt").write_bytes("红".encode("gbk"))
    refused(attempt(TOOL, world, *more, "--out", "out"), name)
    assert not (tmp_path / "out").exists()


def test_weights_alone_need_data_and_nothing_is_called_like_another(world, tmp_path):
    start, data = world.parent / "start.safetensors", ["--data", world.parent / "pairs"]
    refused(attempt(TOOL, start, "--query", "x"), "--data")
    refused(attempt(TOOL, start, start, *data, "--query", "x", "--out", tmp_path), "WEIGHTS")
    refused(attempt(TOOL, start, *data, data[1], "--query", "x", "--out", tmp_path), "--data")
    refused(attempt(TOOL, start, *data, "--query", "x", "--out", start), start.name)
    assert not list(tmp_path.iterdir())
