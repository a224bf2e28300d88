# SPDX-License-Identifier: MIT
"""Speed of a pretraining step, compared with our plain re-implementation (benchmarks/reference.py).

    python -m benchmarks.step --out output/benchmarks
    python -m benchmarks.step --batch_size 256 --steps 20 --compile default max-autotune-no-cudagraphs

All paths train in one process, each with its own model and the same weights, images and masks, in a new random order
every round. The reference is measured twice ("reference, again"); the difference of the two is the noise of the
measurement. Ours prepares dB images within the step. The reference gets prepared images, because its loader prepares
them on the CPU; benchmarks/end_to_end.py includes that cost. On a CPU our programs keep freed memory
(`util.misc.keep_freed_memory`), and each path is measured with and without it. bf16 is skipped if the processor
emulates it, unless --amp requests it. Writes step.json and prints a table.
"""

import ctypes
import time

import torch
from timm.optim import param_groups_weight_decay
from torch.utils.flop_counter import FlopCounterMode

from batch_preparation import BatchPreparation
from benchmarks.reference import ReferenceMixMIM, reference_loss, reference_optimizer, reference_step
from benchmarks.report import benchmark_parser, changed, deadline, in_turns, report, shown, speedup, spread
from models_mixmim import SIZES
from sarwmix.bigearthnetv2 import BigEarthNetv2
from util.distributed import pick_device
from util.misc import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory
from util.optimization import AMP_DTYPES, autocast, emulates_16_bits, optimizer_step
from util.program import COMPILE_MODES

PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "V100": 125}  # dense, 16 bits, of the data sheets
LARGEST_PRODUCT = 8192  # largest side of the matrices whose product measures the peak rate
PRODUCT_SECONDS = 2  # time limit of the largest matrix products together
SIDE = 120  # of a patch as it is stored, pixels
USUAL_MMAP_THRESHOLD, USUAL_TRIM_THRESHOLD = 2**25, 2**26  # bytes; maxima of glibc's dynamic thresholds (mallopt(3))


def training_flop(size):
    """FLOP of a training step per image: matrix products of forward and backward pass, two FLOP per multiply–add."""
    model = SIZES[size](norm_pix_loss=True)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 2, model.img_size, model.img_size))[0].backward()
    return counter.get_total_flops() / 2


def product_seconds(side, device, dtype):
    """Seconds of a product of square matrices: the minimum of three, after one that is not timed."""
    a, seconds = torch.randn(side, side, device=device).to(dtype), []
    for _ in range(4):
        started = time.perf_counter()
        a @ a
        wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def product_rate(device, amp):
    """(FLOP/s of a large product of square matrices in the dtype of --amp, the side of the matrices).

    The side is doubled as long as four products of the next side, each eight times as long, fit PRODUCT_SECONDS.
    """
    side = 128
    while True:
        seconds = product_seconds(side, device, AMP_DTYPES[amp])
        if side == LARGEST_PRODUCT or 4 * 8 * seconds > PRODUCT_SECONDS:
            return 2 * side**3 / seconds, side
        side *= 2


def give_memory_back():
    """Undoes `keep_freed_memory`."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, USUAL_MMAP_THRESHOLD)
    mallopt(M_TRIM_THRESHOLD, USUAL_TRIM_THRESHOLD)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def noise(size, device, seed, count=4):
    """Batches (size, 2, 120, 120) of Gaussian noise with the statistics of the dataset, dB."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in (BigEarthNetv2.MEAN, BigEarthNetv2.STD))
    return [(torch.randn(size, 2, SIDE, SIDE, generator=generator) * std + mean).to(device) for _ in range(count)]


class Path:
    """A model with its optimizer, trained in one way. losses: of all steps so far, numbers or tensors.

    batches: dB images, used in turn. The mask of step i is a function of (seed, i), so all paths have the same input.
    trained: the module that is called with images, which may be a DDP wrapper. keeps_memory: keeps freed memory on a
    CPU.
    """

    keeps_memory = True

    def __init__(self, args, batches, device, amp):
        if device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # as in training
        torch.manual_seed(args.seed)
        self.model = SIZES[args.model](norm_pix_loss=True).to(device)
        self.prepare = BatchPreparation(self.model.img_size, BigEarthNetv2.MEAN, BigEarthNetv2.STD).to(device)
        self.batches, self.device, self.amp, self.seed, self.losses = batches, device, amp, args.seed, []

    def mask(self):
        return self.model.draw_mask(0.5, torch.Generator().manual_seed(self.seed + len(self.losses)))

    def run(self, steps):
        if self.device.type == "cpu":
            (keep_freed_memory if self.keeps_memory else give_memory_back)()
        for _ in range(steps):
            self.losses.append(self.step(self.batches[len(self.losses) % len(self.batches)], self.mask()))
        wait(self.device)


class Reference(Path):
    """The re-implementation. batches: dB images, which are prepared here; None if `step` gets prepared images."""

    def __init__(self, args, batches, device, amp):
        super().__init__(args, batches, device, "fp16" if device.type == "cuda" and amp == "bf16" else amp)
        self.batches = batches and [self.prepare(images) for images in batches]
        self.trained = ReferenceMixMIM(self.model)
        self.optimizer = reference_optimizer(self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")

    def loss(self, prepared, mask):
        return reference_loss(self.trained, *prepared, mask, self.amp)

    def step(self, prepared, mask):
        return reference_step(self.trained, self.optimizer, self.scaler, *prepared, mask, self.amp)


class Ours(Path):
    """Our model. execution: keyword arguments of its `execute_with`."""

    def __init__(self, args, batches, device, amp, **execution):
        super().__init__(args, batches, device, amp)
        self.model.execute_with(**execution)
        self.trained = self.model
        groups = param_groups_weight_decay(self.model, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, images, mask):
        x, weights = self.prepare(images)
        with autocast(self.device, self.amp):
            return self.trained(x, weights, mask=mask)[0]

    def step(self, images, mask):
        loss = self.loss(images, mask)
        self.scaler.scale(loss).backward()
        optimizer_step(self.parameters, self.optimizer, self.scaler, None)
        return loss.detach()


def build_paths(args, device, amp):
    """{name: Path}: the eager paths, then the compiled ones, whose first steps are slow."""
    batches, cpu = noise(args.batch_size, device, args.seed), device.type == "cpu"

    def build(kind, keeps_memory=True, **execution):
        path = kind(args, batches, device, amp, **execution)
        path.keeps_memory = keeps_memory
        return path

    paths = {name: build(Reference, keeps_memory=not cpu) for name in ("reference", "reference, again")}
    if cpu:
        paths["reference, memory kept"] = build(Reference)
    paths["ours"] = build(Ours)
    other = paths["ours"].model.attention_variants[1]  # the first is the default
    if cpu:
        paths["ours, memory not kept"] = build(Ours, keeps_memory=False)
    if args.grad_checkpointing:
        paths["ours, grad_checkpointing"] = build(Ours, grad_checkpointing=True)
    if args.attention:
        paths[f"ours, {other} attention"] = build(Ours, attention=other)
    for mode in args.compile:
        paths[f"ours, compile {mode}"] = build(Ours, compile_mode=mode)
        if args.attention:
            paths[f"ours, compile {mode}, {other} attention"] = build(Ours, compile_mode=mode, attention=other)
    return paths


def warm_up_all(paths, args, device, ends):
    """{name: result of `warm_up`}. Removes the remaining compiled paths once half of the time is over."""
    first, half = {}, None if ends is None else (time.monotonic() + ends) / 2
    for name in list(paths):
        if half is not None and "compile" in name and time.monotonic() > half:
            print(f"{name}: left out, as time is short")
            del paths[name]
        else:
            first[name] = warm_up(paths[name], args.warmup, device)
    return first


def warm_up(path, steps, device):
    """Runs steps that are not timed. Returns (their seconds, peak bytes that one more step allocates on the GPU)."""
    started = time.perf_counter()
    path.run(steps)
    seconds = time.perf_counter() - started
    if device.type != "cuda":
        return seconds, None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    path.run(1)
    return seconds, torch.cuda.max_memory_allocated(device) - before


def measure(args, device, amp):
    """Measures all paths at one precision. Returns a row for each."""
    ends = deadline(args)
    flop, (best, side) = training_flop(args.model), product_rate(device, amp)
    paths = build_paths(args, device, amp)
    first = warm_up_all(paths, args, device, ends)
    seconds = in_turns(
        {name: (lambda path=path: path.run(args.steps)) for name, path in paths.items()}, args.rounds, args.seed, ends
    )
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" and amp != "off" else ""
    peak = next((value * 1e12 for name, value in PEAK_TFLOPS.items() if name in gpu), None)
    reference = [float(loss) for loss in paths["reference"].losses]
    rows = []
    for name, path in paths.items():
        step = spread([value / args.steps for value in seconds[name]])
        rate = args.batch_size / step["median"]
        difference = max(abs(float(loss) / base - 1) for loss, base in zip(path.losses, reference))
        ratio = speedup(seconds["reference"], seconds[name])
        rows.append(
            {
                "amp": path.amp,
                "path": name,
                "ms": step["median"] * 1e3,
                "images_per_s": rate,
                "ratio": ratio,
                "speedup": shown(ratio),
                "tflops": rate * flop / 1e12,
                "of_product": f"{rate * flop / best:.1%}",
                "mfu": f"{rate * flop / peak:.1%}" if peak else "",
                "loss": float(path.losses[-1]),
                "loss_difference": f"{difference:.1e}",
                "first_steps_s": first[name][0],
                "peak_gb": first[name][1] and first[name][1] / 1e9,
                "seconds": seconds[name],
                "flop_per_image": flop,
                "product_tflops": best / 1e12,
                "product_side": side,
            }
        )
    return rows


def add_batch_flags(parser, batch_size=16):
    parser.add_argument(
        "--batch_size", type=int, default=batch_size, help="images of a step of one rank, an even number"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def add_path_flags(parser):
    """Flags that define a `Path`: model, batch, device."""
    parser.add_argument("--model", choices=tuple(SIZES), default="mixmim_base", help="size of the model")
    add_batch_flags(parser)


def add_amp_flag(parser):
    parser.add_argument(
        "--amp", choices=tuple(AMP_DTYPES), help="precision (default: bf16; off where the processor emulates it)"
    )


def add_execution_flags(parser):
    """Flags of the execution that is measured."""
    add_amp_flag(parser)
    parser.add_argument("--compile", choices=COMPILE_MODES, default="off", help="compile ours in this mode")


def add_more_executions(parser):
    """Flags of executions that are measured in addition to the eager one."""
    parser.add_argument(
        "--compile",
        choices=COMPILE_MODES[1:],
        nargs="*",
        default=[],
        metavar="MODE",
        help="also measure ours compiled in these modes",
    )
    parser.add_argument(
        "--grad_checkpointing", action="store_true", help="also measure ours with gradient checkpointing"
    )


def usual_amp(device):
    """The default of --amp: bf16; where that is emulated, fp16 on a GPU or "off" on a CPU, with a message."""
    if not emulates_16_bits(device, torch.bfloat16):
        return "bf16"
    amp = "fp16" if device.type == "cuda" else "off"
    print(f"bf16 is left out: this {'GPU' if device.type == 'cuda' else 'processor'} emulates it; --amp {amp} instead")
    return amp


def main(argv=None):
    parser = benchmark_parser(
        "step", "Speed of a pretraining step, compared with our plain re-implementation.", timed=True
    )
    add_path_flags(parser)
    parser.add_argument(
        "--amp",
        choices=tuple(AMP_DTYPES),
        nargs="+",
        help="precisions; for bf16 the reference uses fp16 on a GPU, as the original approach does (default: bf16 off, "
        "without bf16 where it is emulated)",
    )
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each path")
    parser.add_argument("--warmup", type=int, default=2, help="first steps, not timed")
    add_more_executions(parser)
    parser.add_argument(
        "--attention",
        action="store_true",
        help="also measure ours, and each mode of --compile, with the other implementation of attention",
    )
    args = parser.parse_args(argv)
    device = pick_device(args.device, 0)
    amps = args.amp or list(dict.fromkeys((usual_amp(device), "off")))
    args = changed(args, amp=amps, seconds=args.seconds and args.seconds / len(amps))
    rows = [row for amp in args.amp for row in measure(args, device, amp)]
    report(
        "step",
        args,
        rows,
        {
            "amp": "amp",
            "path": "path",
            "ms": "ms",
            "images_per_s": "images/s",
            "speedup": "× reference (quartiles)",
            "tflops": "TFLOP/s",
            "of_product": "of a product",
            "mfu": "MFU",
            "loss_difference": "losses differ by",
            "first_steps_s": "first steps, s",
            "peak_gb": "peak GB",
        },
    )
    products = ", ".join(
        f"{row['product_tflops']:.2f} TFLOP/s ({row['amp']}, side {row['product_side']})"
        for row in rows
        if row["path"] == "ours"
    )
    print(f"{rows[0]['flop_per_image'] / 1e9:.2f} GFLOP an image; a product of square matrices: {products}")


if __name__ == "__main__":
    main()
