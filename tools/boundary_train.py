"""Train the boundary refiner's network on generated objects, on one CPU core and a half.

    python tools/boundary_train.py --run runs/boundary --steps 20000 --ship kestrel/models/boundary

Goes on from ``state.pt`` when it is started again, with ``--size large`` or ``full`` for the last
third: nearer to the size at which the network works later, or at it, at several times the time.
``--start`` begins with the weights of an ONNX file instead of random ones. Logs to ``log.csv``:
step, seconds, loss, IoU of the network and of the cues' mean that it corrects, learning rate, ms
of this process for each sample. A process beside it draws the samples. ``--ship`` writes the
averaged weights as ONNX and checks that ONNX Runtime gives what torch gives; the refiner runs what
``boundary_quantise.py`` makes of them.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing as mp
import signal
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from boundary_coarse import coarsened
from boundary_model import MEAN, BoundaryNet, loaded, onnx_bytes
from boundary_scenes import BoundaryScenes, Sample
from torch.nn import functional as F

from kestrel.seg_refiner.boundary import CHANNELS, WEIGHTS, load_network, network_planes
from kestrel.seg_refiner.cues import Cues

SHAPES = {
    "middle": ((144, 144), (160, 128), (128, 160), (176, 112), (112, 176), (160, 160)),
    "small": ((128, 128), (128, 128), (144, 112), (112, 144), (96, 144), (144, 96), (112, 112)),
    "large": ((192, 192), (192, 144), (144, 192), (160, 160), (192, 112), (112, 192)),
    "full": ((256, 256), (256, 192), (192, 256), (224, 224), (256, 160), (160, 256)),
}
"""Height and width of a batch, px; sides are multiples of 16."""
BATCH = 16
NEW = 5
"""Samples of a batch that are drawn for it; the others are seen again with new coarse masks."""
POOL = 120
"""Samples of each shape that may be seen again."""
LOG_EVERY, SAVE_EVERY = 20, 60.0
"""Steps; seconds."""
BFLOAT16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""CPUs with AVX-512 convolve bfloat16 at more than twice the rate of float32; others crawl."""
MAX_DIFFERENCE = 1e-2
"""Probability by which ONNX Runtime with its float16 weights may differ from torch, on noise."""


def band_of(sample: Sample) -> np.ndarray:
    """uint8 [h, w]: 1 near the true outline and where the coarse mask is wrong."""
    side = 2 * max(1, round(0.05 * math.sqrt(float(sample.truth.sum())))) + 1
    kernel = np.ones((side, side), np.uint8)
    near = cv2.dilate(sample.truth, kernel) - cv2.erode(sample.truth, kernel)
    return near | (sample.truth ^ sample.coarse)


def again(sample: Sample, rng: np.random.Generator) -> Sample:
    """The same object with another coarse mask, upside down half of the time."""
    image, truth = sample.image, sample.truth
    if rng.random() < 0.5:
        image, truth = np.ascontiguousarray(image[::-1]), np.ascontiguousarray(truth[::-1])
    return Sample(image, truth, coarsened(truth, rng))


def produce(queue: mp.Queue, seed: int, shapes: tuple[tuple[int, int], ...]) -> None:
    """Batches for ever: planes float16 [n, CHANNELS, h, w]; truth and band uint8 [n, h, w]."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    scenes = BoundaryScenes(seed)
    cues = Cues()
    rng = np.random.default_rng(seed + 1)
    drawn: dict[tuple[int, int], list[Sample]] = {shape: [] for shape in shapes}
    while True:
        shape = shapes[int(rng.integers(len(shapes)))]
        pool = drawn[shape]
        pool += [scenes.sample(*shape) for _ in range(NEW)]
        del pool[:-POOL]
        picks = [pool[int(rng.integers(len(pool)))] for _ in range(BATCH - NEW)]
        samples = pool[-NEW:] + [again(pick, scenes.rng) for pick in picks]
        planes = []
        for sample in samples:
            coverage = sample.coarse.astype(np.float32)
            found = cues(sample.image, coverage)
            planes.append(network_planes(sample.image, coverage, found).astype(np.float16))
        truth = np.stack([sample.truth for sample in samples])
        queue.put((np.stack(planes), truth, np.stack([band_of(sample) for sample in samples])))


def loss_of(logits: torch.Tensor, truth: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
    """Cross-entropy that counts in the band above all, and one minus the IoU in the band."""
    weight = 0.1 + band
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    entropy = (entropy * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    share, true = torch.sigmoid(logits) * band, truth * band
    both, either = (share * true).sum((1, 2, 3)), (share + true - share * true).sum((1, 2, 3))
    return (entropy + 0.5 * (1 - both / either.clamp_min(1))).mean()


def recoloured(colours: torch.Tensor) -> torch.Tensor:
    """Colours [n, 3, h, w] with channels exchanged, mixed and now and then inverted.

    An outline is where it is in any colours; the cut-outs are few, and known by theirs.
    """
    mixed = []
    for picture in colours:
        matrix = torch.eye(3)[torch.randperm(3)] * (1 - 2 * (torch.rand(1) < 0.3).float())
        mixed.append(torch.einsum("ij,jhw->ihw", matrix + 0.25 * torch.randn(3, 3), picture))
    out = torch.stack(mixed)
    return out / (out.flatten(1).std(1)[:, None, None, None] + 0.02)


@torch.no_grad()
def iou_of(logits: torch.Tensor, truth: torch.Tensor) -> float:
    found, true = logits > 0, truth > 0.5
    both, either = (found & true).sum((1, 2, 3)), (found | true).sum((1, 2, 3))
    return (both / either.clamp_min(1)).mean().item()


@torch.no_grad()
def average_in(average: BoundaryNet, net: BoundaryNet, step: int) -> None:
    """Exponential average of weights and batch statistics."""
    share = 1 - min(0.998, (1 + step) / (10 + step))
    pairs = zip(average.state_dict().values(), net.state_dict().values(), strict=True)
    for mean, latest in pairs:
        if mean.dtype.is_floating_point:
            mean.lerp_(latest, share)
        else:
            mean.copy_(latest)


class Training:
    """A network on its way, and the folder it is kept in."""

    def __init__(self, run: Path, rate: float, steps: int) -> None:
        self.run, self.rate, self.steps = run, rate, steps
        self.net = BoundaryNet().to(memory_format=torch.channels_last)
        self.average = BoundaryNet()
        self.average.load_state_dict(self.net.state_dict())
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=rate, weight_decay=1e-3)
        self.step, self.spent = 0, 0.0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for name in ("net", "average", "optimiser"):
                getattr(self, name).load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]

    @property
    def file(self) -> Path:
        return self.run / "state.pt"

    def save(self) -> None:
        state = {n: getattr(self, n).state_dict() for n in ("net", "average", "optimiser")}
        partial = self.file.with_suffix(".partial")
        torch.save({**state, "step": self.step, "spent": self.spent}, partial)
        partial.replace(self.file)

    def start_from(self, file: Path, planes: np.ndarray) -> None:
        """The weights of an ONNX file; ``planes``: a batch of what the network will see."""
        self.net.load_state_dict(loaded(file, torch.from_numpy(planes).float()).state_dict())
        self.average.load_state_dict(self.net.state_dict())

    def learn(self, batch: tuple[np.ndarray, np.ndarray, np.ndarray]) -> tuple[float, float, float]:
        """One step; loss, IoU of the network and of the cues' mean."""
        planes, truth, band = (torch.from_numpy(array).float() for array in batch)
        truth, band = truth[:, None], band[:, None]
        planes[:, :3] = recoloured(planes[:, :3])
        if self.step % 2:  # mirroring costs nothing here
            planes, truth, band = planes.flip(3), truth.flip(3), band.flip(3)
        warmth = min(1, (self.step + 1) / 100)
        falling = 0.5 + 0.5 * math.cos(math.pi * min(1, self.step / self.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * warmth * falling + 1e-6
        self.net.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            logits = self.net(planes.to(memory_format=torch.channels_last))
        logits = logits.float()
        loss = loss_of(logits, truth, band)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        average_in(self.average, self.net, self.step)
        before = iou_of(planes[:, MEAN : MEAN + 1], truth)
        return loss.item(), iou_of(logits, truth), before


def train(training: Training, queue: mp.Queue) -> None:
    with (training.run / "log.csv").open("a", buffering=1) as log_file:
        log = csv.writer(log_file)
        recent: list[tuple[float, float, float]] = []
        last = saved = time.monotonic()
        cpu = time.process_time()
        while training.step < training.steps:
            # A worker that died would be waited for for ever.
            recent.append(training.learn(queue.get(timeout=900)))
            now = time.monotonic()
            training.spent += now - last
            last = now
            if training.step % LOG_EVERY == 0:
                per_sample = (time.process_time() - cpu) / len(recent) / BATCH * 1e3
                rate = training.optimiser.param_groups[0]["lr"]
                row = (training.step, training.spent, *np.mean(recent, axis=0), rate, per_sample)
                log.writerow(row)
                print(" ".join(f"{value:.5g}" for value in row), flush=True)
                recent, cpu = [], time.process_time()
            if now - saved > SAVE_EVERY:
                training.save()
                saved = now


def ship(net: BoundaryNet, folder: Path) -> None:
    """Write ``model.onnx``; RuntimeError when ONNX Runtime does not give what torch gives."""
    net.eval()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / WEIGHTS
    file.write_bytes(onnx_bytes(net))
    planes = np.random.default_rng(0).uniform(-1, 1, (2, CHANNELS, 192, 144)).astype(np.float32)
    with torch.no_grad():
        expected = torch.sigmoid(net(torch.from_numpy(planes)))[:, 0].numpy()
    difference = float(np.abs(load_network(file)(planes) - expected).max())
    if difference > MAX_DIFFERENCE:
        raise RuntimeError(f"ONNX Runtime differs from torch by {difference:.4f}")
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, within {difference:.1e} of torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--size", choices=SHAPES, default="small")
    parser.add_argument("--start", type=Path, help="ONNX file whose weights to begin with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ship", type=Path, help="folder for model.onnx")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(args.seed)
    training = Training(args.run, args.rate, args.steps)
    if training.step < args.steps:
        context = mp.get_context("spawn")
        queue = context.Queue(6)
        seed = args.seed * 1000 + training.step
        worker = context.Process(target=produce, args=(queue, seed, SHAPES[args.size]), daemon=True)
        worker.start()
        # Asked to stop, it takes its worker along.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        try:
            if args.start and not training.step:
                training.start_from(args.start, queue.get(timeout=900)[0])
            train(training, queue)
        finally:
            training.save()
            worker.terminate()
            worker.join()
    if args.ship:
        ship(training.average, args.ship)


if __name__ == "__main__":
    main()
