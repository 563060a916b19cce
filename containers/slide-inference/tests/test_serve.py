"""`serve` over real HTTP: packs in, a line a tile out, in order; bad tiles, packs, models cost what they must."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import packages
import pytest
import torch
from PIL import Image
from serving import Served, flat, jpeg, npy, pack, pack_of

Start = Callable[..., Served]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Served] = []

    def begin(package: bytes, **environment: str) -> Served:
        started.append(Served(tmp_path / f"ml-{len(started)}", package, **environment))
        return started[-1].ready()

    yield begin
    for served in started:
        served.end()


RGB = {"outputs": ["r", "g", "b"]}


def means(tiles: list[np.ndarray]) -> np.ndarray:
    return np.stack([tile.mean((0, 1), dtype=np.float64) / 255 for tile in tiles])


def test_a_pack_is_answered_tile_by_tile_in_order_with_the_float32_of_the_model(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), batch=16, **RGB))
    tiles = list(np.random.default_rng(0).integers(0, 256, (100, 64, 64, 3), np.uint8))
    answer = served.invoke(pack_of(tiles))
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/jsonlines"
    assert [line["tile"] for line in answer.lines] == [f"{index * 64}_0" for index in range(100)]
    np.testing.assert_allclose(answer.values, means(tiles), atol=1e-6)
    assert (answer.values == served.invoke(pack_of(tiles)).values).all()
    assert served.ask("GET", "/execution-parameters").json == {
        "MaxConcurrentTransforms": 1, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 100
    }  # fmt: skip
    assert served.ask("GET", "/else").json["error"] == "NotFound"
    assert served.ask("DELETE", "/invocations").status == 501


def test_jpeg_png_and_npy_decode_to_their_pixels_and_long_names_are_read(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), **RGB))
    tile = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    png, grey = io.BytesIO(), io.BytesIO()
    Image.fromarray(tile).save(png, "PNG")
    Image.fromarray(tile[..., 0]).save(grey, "PNG")
    lossy = np.asarray(Image.open(io.BytesIO(jpeg(tile))))
    files = {"0_0.npy": npy(tile), "1_0.png": png.getvalue(), "2_0.jpg": jpeg(tile), "3_0.png": grey.getvalue()}
    values = served.invoke(pack(files)).values
    np.testing.assert_allclose(values[:2], means([tile, tile]), atol=1e-6)
    np.testing.assert_allclose(values[2], means([lossy])[0], atol=1e-3)
    np.testing.assert_allclose(values[3], [tile[..., 0].mean() / 255] * 3, atol=1e-6)
    long = {"folder/" * 30 + "5_7.npy": npy(tile)}
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert [line["tile"] for line in served.invoke(pack(long, format)).lines] == ["5_7"]


def test_single_images_and_json_are_answered_too(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), **RGB))
    tiles = flat(64, [0, 128, 255])
    answer = served.invoke(jpeg(tiles[1]), "image/jpeg")
    assert answer.json["outputs"] == ["r", "g", "b"]
    np.testing.assert_allclose(answer.json["values"], [128 / 255] * 3, atol=1e-6)
    instances = [{"b64": base64.b64encode(jpeg(tile)).decode()} for tile in tiles]
    document = json.dumps({"instances": instances}).encode()
    np.testing.assert_allclose(
        served.invoke(document, "application/json").json["predictions"], means(tiles), atol=1e-6
    )

    for body, media_type, status, error in (
        (jpeg(tiles[0])[:300], "image/jpeg", 400, "TileUnreadable"),
        (jpeg(flat(32, [9])[0]), "image/jpeg", 400, "TileUnreadable"),
        (b'{"instances": [{"b64": "!"}]}', "application/json", 400, "RequestInvalid"),
        (b"{", "application/json", 400, "RequestInvalid"),
        (b"a,b", "text/csv", 415, "MediaTypeNotSupported"),
    ):
        refused = served.invoke(body, media_type)
        assert (refused.status, refused.json["error"]) == (status, error)
        assert refused.json["message"]


def test_a_bad_tile_is_a_line_and_not_the_end_of_the_pack(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), batch=4, **RGB))
    tile = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    good = jpeg(tile)
    bad = {
        "cut": good[: len(good) // 2],
        "bits": good[:600] + bytes(200) + good[800:],
        "small": jpeg(tile[:32]),
        "empty": b"",
        "text": b"no picture at all",
        "bomb": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\xff\xff\0\0\xff\xff\x08\x02\0\0\0",
        "objects": npy(np.array([{}], object)),
    }
    files = {f"{index}_0.jpg": good for index in range(5)}
    for index, (name, data) in enumerate(bad.items()):
        files |= {f"{name}.jpg": data, f"after-{index}.jpg": good}
    lines = served.invoke(pack(files)).lines
    assert [line["tile"] for line in lines] == [name.removesuffix(".jpg") for name in files]
    assert {line["tile"] for line in lines if "error" in line} == set(bad)
    assert all(line["error"]["error"] == "TileUnreadable" for line in lines if "error" in line)
    assert "64 × 32 pixels where the model takes 64 × 64" in next(
        line["error"]["message"] for line in lines if line["tile"] == "small"
    )
    assert len({tuple(line["values"]) for line in lines if "values" in line}) == 1


def test_a_damaged_pack_is_refused_by_name(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), **RGB))
    whole = pack_of(flat(64, [1, 2, 3]))
    member = 512 + 25 * 512  # header, and 64 × 64 × 3 bytes with .npy's header, in blocks
    for body, said in (
        (b"", "no tar file"),
        (b"x" * 5000, "no tar file"),
        (whole[:20_000], "ends early"),
        (whole[: 3 * member], "ends early"),  # after its last tile, but tar has an end of its own
        (whole[:member] + b"\xff" * 512 + whole[member + 512 :], f"damaged at byte {member}"),
        (b"\x1f\x8b" + whole, "no tar file"),
    ):
        refused = served.ask(
            "POST", "/invocations", body, "application/x-tar", **{"Content-Length": str(len(body))}
        )
        assert (refused.status, refused.json["error"]) == (400, "PackInvalid"), body[:20]
        assert said in refused.json["message"]
    assert served.invoke(pack({})).body == b""
    assert served.invoke(whole).status == 200


def test_what_is_too_large_is_refused_before_it_is_read(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), **RGB), SAGEMAKER_MAX_PAYLOAD_IN_MB="1")
    large = pack_of(flat(64, list(range(120))))
    assert len(large) > 1 << 20
    refused = served.invoke(large)
    assert (refused.status, refused.json["error"]) == (413, "PayloadTooLarge")

    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = "POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-tar\r\n"
        connection.sendall(f"{head}Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096)  # without a byte of the body

    pieces = [large[at : at + 50_000] for at in range(0, len(large), 50_000)]
    for given, status in (
        (pieces, 413),
        ([pack_of(flat(64, [5, 6]))[:20_000], pack_of(flat(64, [5, 6]))[20_000:]], 200),
    ):
        chunked = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        chunked.request(
            "POST", "/invocations", iter(given), {"Content-Type": "application/x-tar"}, encode_chunked=True
        )
        assert chunked.getresponse().status == status
        chunked.close()


def test_requests_of_several_connections_are_joined_into_full_batches_and_not_mixed_up(start: Start) -> None:
    package = packages.model_package(packages.BatchAndLight(), batch=32, outputs=["batch", "light"])
    served = start(package)
    requests = [flat(64, [number * 16 + index for index in range(8)]) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda tiles: served.invoke(pack_of(tiles)), requests))
    for tiles, answer in zip(requests, answers, strict=True):
        np.testing.assert_allclose(answer.values[:, 1], means(tiles)[:, 0], atol=1e-6)
    together = np.concatenate([answer.values[:, 0] for answer in answers])
    assert together.max() > 8  # a request alone has 8 tiles


def test_a_model_that_raises_at_one_tile_costs_that_tile(start: Start) -> None:
    served = start(packages.model_package(packages.RefusesDark(), batch=16))
    grey = [200] * 40
    grey[17] = grey[33] = 10
    lines = served.invoke(pack_of(flat(64, grey))).lines
    failed = [index for index, line in enumerate(lines) if "error" in line]
    assert failed == [17, 33]
    assert lines[17]["error"] == {
        "error": "ModelError",
        "message": "The model raised: builtins.RuntimeError: too dark for me",
    }
    np.testing.assert_allclose([line["values"][0] for line in lines if "values" in line], 200 / 255, atol=1e-6)
    alone = served.invoke(jpeg(flat(64, [10])[0]), "image/jpeg")
    assert (alone.status, alone.json["error"]) == (500, "ModelError")


class StopsAtDark(torch.nn.Module):
    """Never answers for a dark tile."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        mean = tiles.mean((1, 2, 3))
        while bool((mean < 0.25).any()):
            mean = mean * 1.0
        return mean.unsqueeze(1)


def test_a_model_that_never_answers_fails_its_request_and_the_server_starts_anew(start: Start) -> None:
    served = start(packages.model_package(StopsAtDark()), SLIDEWAY_MODEL_SECONDS="2")
    first = served.worker()
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(served.invoke, pack_of(flat(64, [10])))
        time.sleep(0.5)
        asked = time.monotonic()
        assert served.ask("GET", "/ping").status == 200
        assert time.monotonic() - asked < 2
        answer = stuck.result()
    assert (answer.status, answer.json["error"]) == (500, "ModelStuck")
    assert "within 2 s" in answer.json["message"]
    after = served.invoke(pack_of(flat(64, [200])))
    if after.status == 503:  # it came just before the old worker left
        after = served.ready().invoke(pack_of(flat(64, [200])))
    assert after.status == 200
    assert served.worker() != first
    assert served.named("model-stuck")


CRASHES = """
import ctypes
import torch
kept = []
def model_fn(folder):
    return None
def predict_fn(data, model):
    light = data.mean((1, 2, 3))
    if (light < 0.1).any():
        ctypes.string_at(0)
    if (light > 0.9).any():
        kept.append(bytearray(300 << 20))
    return light.unsqueeze(1)
"""


def test_a_model_that_crashes_the_interpreter_is_started_anew(start: Start) -> None:
    served = start(packages.code_package(CRASHES))
    with pytest.raises((OSError, http.client.HTTPException)):
        served.invoke(pack_of(flat(64, [0])))
    assert served.ready().invoke(pack_of(flat(64, [100]))).status == 200
    assert served.named("serve-again")[0]["exitCode"] == -11


def test_a_model_that_takes_all_memory_is_started_anew_after_its_requests(start: Start) -> None:
    served = start(packages.code_package(CRASHES), SLIDEWAY_MEMORY_MB="900")
    first = served.worker()
    for _ in range(6):
        try:
            assert served.invoke(pack_of(flat(64, [255]))).status in (200, 503)
        except (OSError, http.client.HTTPException):
            break
        time.sleep(0.3)
    assert served.ready().invoke(pack_of(flat(64, [100]))).status == 200
    assert served.worker() != first
    assert "900 MB is the limit" in served.named("memory-high")[0]["message"]


def test_sigterm_finishes_what_is_under_way_and_refuses_the_rest(start: Start) -> None:
    served = start(packages.model_package(packages.Slow(), batch=1))
    idle = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    idle.request("GET", "/ping")
    idle.getresponse().read()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.invoke, pack_of(flat(64, [100] * 12)))
        time.sleep(0.5)
        served.process.terminate()
        time.sleep(0.5)
        assert not running.done()
        refused = served.invoke(pack_of(flat(64, [1])))
        assert (refused.status, refused.json["error"]) == (503, "Unavailable")
        idle.request("GET", "/ping")
        assert idle.getresponse().status == 503
        assert len(running.result().lines) == 12
    assert served.end() == 0
    assert served.named("serve-ended")[0]["drained"] is True


def test_a_request_that_takes_too_long_is_given_up(start: Start) -> None:
    served = start(packages.model_package(packages.Slow(), batch=1), SLIDEWAY_REQUEST_SECONDS="3")
    answer = served.invoke(pack_of(flat(64, [100] * 200)))
    assert (answer.status, answer.json["error"]) == (504, "AnswerTimeout")
    short = served.invoke(pack_of(flat(64, [100])))  # the rest of the first is not worked on
    assert short.status == 200


def test_memory_stays_bounded_under_large_payloads(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), **RGB))
    served.invoke(pack_of(flat(64, [1] * 64)))
    base = resident(served.worker())
    large = pack_of(flat(64, [index % 256 for index in range(7000)]))
    assert 80 << 20 < len(large) < 100 << 20
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, resident(served.worker()))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(served.invoke, [large] * 6))
    finally:
        done.set()
        watching.join()
    assert {answer.status for answer in answers} == {200}
    assert all(len(answer.lines) == 7000 for answer in answers)
    # Two payloads are let in at once; six would be 540 MB.
    assert peak - base < 350 << 20


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_an_unusable_package_ends_it_with_the_reason(tmp_path: Path) -> None:
    text = json.dumps(packages.document()).encode()
    served = Served(tmp_path, packages.package({"model.json": text, "model.pt": b"weights"}))
    assert served.process.wait(60) == 1
    served.end()
    assert served.named("serve-failed")[0]["error"] == "ModelPackageInvalid"
    assert served.stderr.splitlines()[-1].startswith("ModelPackageInvalid: model.pt is not TorchScript")


def test_the_worker_ends_with_the_process_that_watches(start: Start) -> None:
    served = start(packages.model_package(packages.ChannelMeans(), **RGB))
    worker = served.worker()
    served.process.kill()
    served.process.wait()
    until = time.monotonic() + 10
    while Path(f"/proc/{worker}/stat").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}/stat").exists()
