"""The same OT-MDR step in PyTorch: a wide ResNet, K = 1, two random halves.

    python benchmarks/pytorch_step.py --json pytorch.json       # WRN-28-10, a GPU
    python benchmarks/pytorch_step.py --smoke                   # tiny, on a CPU

Written as one would for speed: channels_last, bfloat16 autocast, `torch.compile`, fused
SGD, foreach operations for the ascent. Radii 0.05 and 0.1, learning rate 0.1, momentum
0.9, weight decay 5e-4. BatchNorm's running statistics move in the pass at the center
alone, as in this package. Times are medians over rounds of `--steps` steps between two
synchronisations; each configuration is written down as soon as it is measured.
Expected: about 2 minutes on an H100, most of it compilation.
"""

import statistics
import time

import torch
from _record import options_of, write_json
from torch import nn
from torch.nn import functional as F

RHO = (0.05, 0.1)


class Block(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        activated = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(activated))))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    def __init__(self, depth, width, num_classes=10):
        super().__init__()
        channels, blocks = 16, []
        self.stem = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        for stage in range(3):
            for index in range((depth - 4) // 6):
                out_channels = 16 * width * 2**stage
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Block(channels, out_channels, stride))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images):
        x = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.head(x.mean(dim=(2, 3)))


def make_step(module, forward, images, labels, dtype):
    """A function of nothing that takes one OT-MDR step."""
    device = images.device.type
    params = list(module.parameters())
    statistics_ = [x for x in module.buffers() if x.is_floating_point()]
    center = [torch.empty_like(p) for p in params]
    moved = [torch.empty_like(x) for x in statistics_]
    optimizer = torch.optim.SGD(
        params, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=device == "cuda"
    )

    def gradient(images, labels):
        enabled = dtype == torch.bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        return torch.autograd.grad(loss, params)

    def step():
        with torch.no_grad():
            torch._foreach_copy_(center, params)
        halves = torch.randperm(len(labels), device=device).chunk(len(RHO))
        for s, (half, rho) in enumerate(zip(halves, RHO, strict=True)):
            part = images[half].contiguous(memory_format=torch.channels_last)
            grads = gradient(part, labels[half])
            with torch.no_grad():
                norms = torch.stack(torch._foreach_norm(grads))
                scale = rho / torch.linalg.vector_norm(norms)
                torch._foreach_add_(params, torch._foreach_mul(grads, scale))
                if s == 0:
                    torch._foreach_copy_(moved, statistics_)
        grads = gradient(images, labels)
        with torch.no_grad():
            torch._foreach_copy_(params, center)
            torch._foreach_copy_(statistics_, moved)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()

    return step


def measure(step, rounds, steps, device):
    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    for _ in range(3):  # compiles, tunes the convolutions, warms up
        step()
    wait()
    warm_up = time.perf_counter() - start
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times), warm_up


def main():
    parser = options_of(__doc__, "a tiny network, one step, on the CPU")
    add = parser.add_argument
    add("--depth", type=int, default=28)
    add("--width", type=int, default=10)
    add("--batch-sizes", type=int, nargs="*", default=[128, 512])
    add("--image-size", type=int, default=32)
    add("--dtypes", nargs="*", default=["bfloat16"], choices=["bfloat16", "float32"])
    add("--rounds", type=int, default=11)
    add("--steps", type=int, default=10, help="steps between two synchronisations")
    options = parser.parse_args()
    if options.smoke:
        options.depth, options.width, options.batch_sizes = 10, 1, [8]
        options.image_size, options.rounds, options.steps = 16, 1, 1
        options.dtypes = ["float32"]  # bfloat16 takes seconds a step on a CPU
    on_gpu = torch.cuda.is_available() and not options.smoke
    device = "cuda" if on_gpu else "cpu"
    torch.backends.cudnn.benchmark = True
    # TF32, as JAX's and cuDNN's defaults for float32 on these devices.
    torch.set_float32_matmul_precision("high")

    def fresh():
        torch.manual_seed(0)
        module = WideResNet(options.depth, options.width).to(device)
        return module.to(memory_format=torch.channels_last).train()

    module = fresh()
    record = {
        "model": f"wide_resnet_{options.depth}_{options.width}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "parameters": sum(p.numel() for p in module.parameters()),
        "results": {},
    }
    write_json(options.json, record)
    print(f"{record['model']}: {record['parameters']} parameters", flush=True)
    # Compiled last: a failure or a timeout leaves the figures of eager execution.
    for compiled in (False, True):
        for name in options.dtypes:
            for size in options.batch_sizes:
                label = f"{name} {size} {'compiled' if compiled else 'eager'}"
                result = {}
                try:
                    torch.compiler.reset()  # else the limit of recompilations counts on
                    module = fresh()
                    # Shapes of a half and of a whole batch, each compiled for itself.
                    forward = (
                        torch.compile(module, dynamic=False) if compiled else module
                    )
                    shape = (size, 3, options.image_size, options.image_size)
                    images = torch.randn(shape, device=device)
                    images = images.contiguous(memory_format=torch.channels_last)
                    labels = torch.arange(size, device=device) % 10
                    step = make_step(
                        module, forward, images, labels, getattr(torch, name)
                    )
                    if on_gpu:
                        torch.cuda.reset_peak_memory_stats()
                    seconds, warm_up = measure(
                        step, options.rounds, options.steps, device
                    )
                    result = {
                        "milliseconds": 1e3 * seconds,
                        "images_per_second": size / seconds,
                        "warm_up_seconds": warm_up,
                        "n": options.rounds,
                    }
                    if on_gpu:
                        result["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
                except Exception as error:
                    result = {"error": f"{type(error).__name__}: {error}"[:500]}
                record["results"][label] = result
                write_json(options.json, record)
                print(f"PyTorch {label}: {result}", flush=True)


if __name__ == "__main__":
    main()
