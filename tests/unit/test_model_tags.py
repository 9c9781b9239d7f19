"""Model tags on tiny random weights in the real files' formats, against direct computations by the libraries.

Scores of the real weights are not compared with anything: they cannot be had here.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_tag_models import (
    WIDTH,
    aesthetic_state,
    chinese_clip_folder,
    clip_folder,
    filled_detector,
    frames_of,
    ingested,
    linear_state,
    nsfw_h14_state,
    nsfw_l14_state,
    pseudo_random,
)
from transformers import BertTokenizer, ChineseCLIPModel, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from data_prep import tag
from data_prep.model_tags import TagBatch, load_models_config, model_fingerprints
from data_prep.model_tags.clip import ClipEncoder
from data_prep.model_tags.heads import AestheticTag, NsfwTag
from data_prep.model_tags.ocr import OcrTag, box_share
from data_prep.model_tags.text_video import TextVideoTag
from data_prep.model_tags.watermark import WatermarkTag, detector, prepare
from data_prep.workers import Execution, Shard
from megatron_video.errors import UserError
from megatron_video.manifest import Row, read_manifest

CPU, FP32 = torch.device("cpu"), torch.float32
SKIP = {"skip": True}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that a models.yaml can name."""
    folder = tmp_path_factory.mktemp("weights")
    clip_folder(folder / "clip")
    chinese_clip_folder(folder / "chinese")
    torch.save(aesthetic_state(), folder / "aesthetic.pth")
    torch.save(nsfw_l14_state(), folder / "nsfw_l14.pth")
    save_file(nsfw_h14_state(), folder / "nsfw_h14.safetensors")
    torch.manual_seed(2)
    torch.save(detector().state_dict(), folder / "watermark.pt")
    return folder


@pytest.fixture(scope="module")
def encoder(weights: Path) -> ClipEncoder:
    return ClipEncoder(weights / "clip", CPU, FP32)


def image_vectors(folder: Path, model_class: Any, frames: np.ndarray) -> torch.Tensor:
    """Unit vectors by the library alone, picture by picture."""
    model, processor = model_class.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    vectors = []
    for frame in frames:
        pixels = processor(Image.fromarray(frame), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            pooled = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
        vectors.append(pooled[0] / pooled[0].norm())
    return torch.stack(vectors)


def batch_of(*clips: np.ndarray, **columns: list[Any]) -> TagBatch:
    rows: list[Row] = [{name: values[n] for name, values in columns.items()} for n in range(len(clips))]
    return TagBatch(rows, list(clips))


CLIPS = (frames_of(1), frames_of(2, count=1), frames_of(3, count=4, height=64))


# --- scores against the libraries -------------------------------------------------------------------------------------


def test_embeddings_equal_transformers(weights: Path, encoder: ClipEncoder) -> None:
    for clip, vectors in zip(CLIPS, batch_of(*CLIPS).image_embeddings(encoder), strict=True):
        torch.testing.assert_close(vectors, image_vectors(weights / "clip", CLIPModel, clip), atol=2e-6, rtol=1e-5)


def test_aesthetic_is_the_mean_of_the_mlp_over_unit_vectors(weights: Path, encoder: ClipEncoder) -> None:
    state = aesthetic_state()
    scores = AestheticTag(encoder, weights / "aesthetic.pth").score(batch_of(*CLIPS))
    for clip, score in zip(CLIPS, scores, strict=True):
        x = image_vectors(weights / "clip", CLIPModel, clip)
        # No activation between the layers: so is the published predictor.
        for position in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{position}.weight"].T + state[f"layers.{position}.bias"]
        assert score == pytest.approx(x.mean().item(), abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 3


def test_nsfw_heads_of_both_layouts_take_the_worst_frame(weights: Path, encoder: ClipEncoder) -> None:
    small, large = nsfw_l14_state(), nsfw_h14_state()
    scores = {
        name: NsfwTag(encoder, weights / name).score(batch_of(*CLIPS))
        for name in ("nsfw_l14.pth", "nsfw_h14.safetensors")
    }
    for number, clip in enumerate(CLIPS):
        vectors = image_vectors(weights / "clip", CLIPModel, clip)
        x = (vectors - small["norm.mean"]) / small["norm.variance"] ** 0.5
        for layer in (1, 2, 3):
            x = (x @ small[f"linear_{layer}.weight"].T + small[f"linear_{layer}.bias"]).clamp(min=0)
        x = 1 / (1 + torch.exp(-(x @ small["linear_4.weight"].T + small["linear_4.bias"])))
        assert scores["nsfw_l14.pth"][number] == pytest.approx(x.max().item(), abs=1e-5)
        x = vectors
        for position in (0, 3, 6, 9, 12, 15, 16):
            x = x @ large[f"layers.{position}.weight"].T + large[f"layers.{position}.bias"]
            x = x.clamp(min=0) if position < 15 else x
        assert scores["nsfw_h14.safetensors"][number] == pytest.approx(x.max().item(), abs=1e-5)


def test_text_video_is_the_mean_cosine_and_chinese_goes_to_chinese_clip(weights: Path, encoder: ClipEncoder) -> None:
    captions, languages = ["a red square", "红色方块向上移动", "blue"], ["en", "zh", "en"]
    batch = batch_of(*CLIPS, caption=captions, language=languages)
    chinese = ClipEncoder(weights / "chinese", CPU, FP32)
    scores = TextVideoTag(encoder, chinese).score(batch)
    for clip, caption, language, score in zip(CLIPS, captions, languages, scores, strict=True):
        folder, kind = (weights / "chinese", ChineseCLIPModel) if language == "zh" else (weights / "clip", CLIPModel)
        tokenizer = (BertTokenizer if language == "zh" else CLIPTokenizer).from_pretrained(folder)
        model = kind.from_pretrained(folder).eval()
        tokens = tokenizer([caption], truncation=True, max_length=12 if language == "en" else 20, return_tensors="pt")
        with torch.no_grad():
            output = model.text_model(**tokens)
            pooled = output.last_hidden_state[:, 0] if language == "zh" else output.pooler_output
            text = model.text_projection(pooled)[0]
        cosines = image_vectors(folder, kind, clip) @ (text / text.norm())
        assert score == pytest.approx(cosines.mean().item(), abs=1e-5)
    only = TextVideoTag(encoder, None).score(batch)
    assert only[0] == pytest.approx(scores[0], abs=1e-6)
    assert only[1] != pytest.approx(scores[1], abs=1e-4)


def test_a_long_caption_is_cut_off_and_no_error(encoder: ClipEncoder) -> None:
    long, longer = "a" * 3000, "a" * 9000
    assert torch.equal(encoder.embed_texts([long]), encoder.embed_texts([longer]))


# --- watermark --------------------------------------------------------------------------------------------------------


def test_efficientnet_has_timms_names_and_gives_timms_numbers() -> None:
    network = filled_detector()
    names = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in network.state_dict().items())
    # Recorded from timm 1.0.31, efficientnet_b3 with the published classifier, filled by the same rule.
    assert hashlib.sha256(names.encode()).hexdigest() == (
        "9f4766fb4c7c25e7d9fd4057b3651df94afe73aa9d50ccb84eb1bef736a36450"
    )
    pixels = 2 * pseudo_random(2 * 3 * 64 * 64, -1).float().reshape(2, 3, 64, 64)
    pixels[1] = pixels[1].clamp(min=0)
    with torch.no_grad():
        logits = network(pixels)
    expected = torch.tensor([[7.554749, 11.860098], [0.769733, 1.038429]])
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_watermark_is_the_mean_probability_of_the_first_class(weights: Path) -> None:
    network = detector().eval()
    network.load_state_dict(torch.load(weights / "watermark.pt"))
    clips = CLIPS[:2]
    scores = WatermarkTag(weights / "watermark.pt", CPU, FP32).score(batch_of(*clips))
    for clip, score in zip(clips, scores, strict=True):
        with torch.no_grad():
            logits = [network(prepare(frame)[None])[0].double() for frame in clip]
        shares = [math.exp(a) / (math.exp(a) + math.exp(b)) for a, b in logits]
        assert score == pytest.approx(np.mean(shares), abs=1e-5)


def test_the_detectors_input_is_a_normalised_square() -> None:
    grey = np.full((30, 70, 3), (0, 128, 255), np.uint8)
    pixels = prepare(grey)
    assert pixels.shape == (3, 256, 256)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


# --- OCR --------------------------------------------------------------------------------------------------------------


def test_box_share_is_the_union_of_boxes() -> None:
    square = np.array([[0, 0], [19, 0], [19, 9], [0, 9]], float)
    assert box_share([square], 50, 100) == pytest.approx(200 / 5000)
    assert box_share([square, square + np.array([10, 0])], 50, 100) == pytest.approx(300 / 5000)
    assert box_share([], 50, 100) == 0


def ocr_models() -> dict[str, Path]:
    rapidocr = pytest.importorskip("rapidocr", reason="OCR needs the extra `data`")
    pytest.importorskip("onnxruntime", reason="OCR needs the extra `data`")
    found = sorted((Path(rapidocr.__file__).parent / "models").glob("*.onnx"))
    files = {kind: next((path for path in found if f"_{kind}_" in path.name), None) for kind in ("det", "rec")}
    if None in files.values():
        pytest.skip("this release of rapidocr brings no networks in its wheel")
    return {"detection": files["det"], "recognition": files["rec"]}  # type: ignore[dict-item]


def test_ocr_finds_rendered_text_and_nothing_on_a_plain_picture() -> None:
    clean = np.full((200, 480, 3), 70, np.uint8)
    text = clean.copy()
    font, size, words = cv2.FontFace("sans"), 32, "Good evening, everyone"
    cv2.putText(text, words, (40, 150), (255, 255, 255), font, size)
    _, _, width, height = cv2.getTextSize((0, 0), words, (0, 0), font, size)
    ocr = OcrTag(**ocr_models(), keys=None, min_score=0.5, device=CPU)
    half, none = ocr.score(batch_of(np.stack([clean, text]), clean[None]))
    share = width * height / clean[..., 0].size
    assert none == 0
    # Text in one of two frames; the engine's boxes have a margin around the letters.
    assert 0.8 * share / 2 < half < 2 * share / 2


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    models = ocr_models()
    (tmp_path / "det.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"det\.onnx"):
        OcrTag(tmp_path / "det.onnx", models["recognition"], None, 0.5, CPU)


# --- wrong files ------------------------------------------------------------------------------------------------------


def models_yaml(path: Path, **tags: Any) -> Path:
    every = {name: SKIP for name in ("aesthetic", "nsfw", "watermark", "ocr", "text_video")} | tags
    # Paths as text, as a user writes them; None leaves a tag out.
    plain = {
        name: {k: v if v is True else str(v) for k, v in fields.items()} for name, fields in every.items() if fields
    }
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.mark.parametrize(
    ("tags", "complaint"),
    [
        ({"nsfw": None}, "nsfw is not configured; name its files, or say `nsfw: {skip: true}`"),
        ({"aesthetic": {"clip": "x"}}, "aesthetic: head missing"),
        ({"watermark": {"skip": True, "weights": "x"}}, "beside `skip: true`"),
        ({"watermark": {"weigths": "x"}}, "did you mean 'weights'"),
    ],
)
def test_a_models_file_that_leaves_something_open_is_refused(
    tmp_path: Path, tags: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError) as error:
        load_models_config(models_yaml(tmp_path / "m.yaml", **tags))
    assert complaint in str(error.value)


def test_a_missing_file_is_an_error_that_names_it_before_any_clip_is_read(tmp_path: Path, weights: Path) -> None:
    manifest = ingested(tmp_path)
    for tags in (
        {"watermark": {"weights": tmp_path / "gone.pt"}},
        {"nsfw": {"clip": tmp_path / "gone", "head": weights / "nsfw_l14.pth"}},
        {"text_video": {"clip": weights / "clip", "chinese_clip": tmp_path / "gone"}},
    ):
        with pytest.raises(UserError, match=r"(watermark\.weights|nsfw\.clip|text_video\.chinese_clip): .*gone"):
            tag.run(manifest, tmp_path / "2.parquet", models=models_yaml(tmp_path / "m.yaml", **tags))
        assert not (tmp_path / "2.parquet").exists()


def test_weights_that_lack_a_tensor_are_refused_not_made_up(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack or mismatch 1 tensors, such as visual_projection\.weight"):
        ClipEncoder(folder, CPU, FP32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: {}, r"no layers\.0\.weight in it"),
        (lambda state: state | {"layers.1.weight": torch.ones(1)}, "another layout"),
        (lambda state: {**state, **linear_state("layers.0", 20, 768)}, f"embeddings of 768, .* gives {WIDTH}"),
        (lambda state: [1, 2], "holds a list"),
    ],
)
def test_a_head_of_another_layout_is_refused(tmp_path: Path, encoder: ClipEncoder, change: Any, complaint: str) -> None:
    torch.save(change(aesthetic_state()), tmp_path / "head.pth")
    with pytest.raises(UserError, match=complaint):
        AestheticTag(encoder, tmp_path / "head.pth")


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path, encoder: ClipEncoder) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"layers.0.weight": Evil()}, tmp_path / "head.pth")
    with pytest.raises(UserError, match="not readable as a state dict"):
        AestheticTag(encoder, tmp_path / "head.pth")
    assert not (tmp_path / "ran").exists()


# --- the stage --------------------------------------------------------------------------------------------------------


def all_tags(weights: Path) -> dict[str, Any]:
    return {
        "aesthetic": {"clip": weights / "clip", "head": weights / "aesthetic.pth"},
        "nsfw": {"clip": weights / "clip", "head": weights / "nsfw_l14.pth"},
        "watermark": {"weights": weights / "watermark.pt"},
        "text_video": {"clip": weights / "clip", "chinese_clip": weights / "chinese"},
    }


def test_the_stage_fills_scores_and_says_which_model_made_them(tmp_path: Path, weights: Path) -> None:
    manifest = ingested(tmp_path, clips=5)
    (tmp_path / "in" / "3.mp4").write_bytes(b"gone bad")
    config = models_yaml(tmp_path / "m.yaml", **all_tags(weights))
    config.write_text(config.read_text() + "clips_per_batch: 2\n")
    report = tag.run(manifest, tmp_path / "2.parquet", models=config)
    rows = read_manifest(tmp_path / "2.parquet").to_pylist()
    assert [row["dropped_by"] for row in rows] == [None, None, None, "tag", None]
    assert (report.rows_in, report.kept, report.reasons) == (5, 4, {"unreadable": 1})
    prints = model_fingerprints(load_models_config(config))
    assert set(prints) == {"aesthetic", "nsfw", "watermark", "text_video"}
    encoder = ClipEncoder(weights / "clip", CPU, FP32)
    for row in rows:
        if row["dropped_by"]:
            continue
        assert json.loads(row["tag_models"]) == prints
        assert row["ocr_area"] is None
        plain, frames = tag.tag_clip({**row})
        assert plain["phash"] == row["phash"]
        batch = batch_of(frames, caption=[row["caption"]], language=[row["language"]])
        expected = AestheticTag(encoder, weights / "aesthetic.pth").score(batch)[0]
        assert row["aesthetic"] == pytest.approx(expected, abs=1e-5)
        assert -1 <= row["text_video_score"] <= 1
        assert 0 <= row["nsfw"] <= 1
        assert 0 <= row["watermark"] <= 1


def test_other_weights_are_another_fingerprint_and_a_new_run(tmp_path: Path, weights: Path) -> None:
    manifest = ingested(tmp_path)
    clip = clip_folder(tmp_path / "clip", seed=1)
    (tmp_path / "head.pth").write_bytes((weights / "aesthetic.pth").read_bytes())
    config = models_yaml(tmp_path / "m.yaml", aesthetic={"clip": clip, "head": tmp_path / "head.pth"})
    first = tag.run(manifest, tmp_path / "2.parquet", models=config)
    assert tag.run(manifest, tmp_path / "2.parquet", models=config).up_to_date
    clip_folder(tmp_path / "clip", seed=2)
    again = tag.run(manifest, tmp_path / "2.parquet", models=config)
    assert not again.up_to_date
    assert first.details["models"] != again.details["models"]
    # Also in a process that has loaded the old ones.
    row = read_manifest(tmp_path / "2.parquet").to_pylist()[0]
    scorer = AestheticTag(ClipEncoder(clip, CPU, FP32), tmp_path / "head.pth")
    assert row["aesthetic"] == pytest.approx(scorer.score(batch_of(tag.tag_clip(row)[1]))[0], abs=1e-5)


def spread_runs(tmp_path: Path, weights: Path, spread: list[Execution]) -> None:
    manifest = ingested(tmp_path, clips=5)
    config = models_yaml(tmp_path / "m.yaml", aesthetic={"clip": weights / "clip", "head": weights / "aesthetic.pth"})
    config.write_text(config.read_text() + "clips_per_batch: 2\n")
    tag.run(manifest, tmp_path / "one.parquet", models=config)
    for execution in spread:
        tag.run(manifest, tmp_path / "many.parquet", execution, models=config)
    assert read_manifest(tmp_path / "one.parquet").equals(read_manifest(tmp_path / "many.parquet"))


def test_scores_do_not_depend_on_shards(tmp_path: Path, weights: Path) -> None:
    spread_runs(tmp_path, weights, [Execution(shard=Shard(index, 2), in_process=True) for index in (1, 0)])


@pytest.mark.heavy
def test_scores_do_not_depend_on_workers(tmp_path: Path, weights: Path) -> None:
    spread_runs(tmp_path, weights, [Execution(workers=2)])


def test_a_wrong_model_stops_the_run_and_drops_no_clip(tmp_path: Path, weights: Path) -> None:
    manifest = ingested(tmp_path)
    head = {"clip": weights / "clip", "head": weights / "nsfw_l14.pth"}
    with pytest.raises(UserError, match=r"nsfw_l14\.pth: no layers"):
        tag.run(manifest, tmp_path / "2.parquet", models=models_yaml(tmp_path / "m.yaml", aesthetic=head))
    assert not (tmp_path / "2.parquet").exists()
