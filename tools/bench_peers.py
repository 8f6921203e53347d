#!/usr/bin/env python3
"""bench_peers.py - psa beside PyTorch, ONNX Runtime and ggml, interleaved in time, in one table.

    pip install torch==2.15.0 onnx==1.23.2 onnxruntime==1.31.1
    make all ggml && python tools/bench_peers.py --n 4096 --d 64,128 --threads 1

Every round runs every row, and the rounds repeat. Within a round a peer is called once untimed and CALLS times timed;
psa bench warms up and repeats by itself. The median is of the rounds' medians, min and max are over all calls.
FlexAttention needs a C++ compiler and keeps or skips whole blocks, here at random places; psa has pooled levels in
between, so the same density means the same work, not the same keys seen. ggml takes Q in f32 whatever --type says, and
has a fast path for K and V in f32 and f16 only. Its speed depends on its compiler: on AVX-512 compare with "make ggml
CC=clang CXX=clang++", on AVX2 with gcc's. A peer that does not work is skipped with a line that says why.
"/ whole call" is the median of the rounds' ratios to psa's whole call, with the least and the most. psa bench draws
inputs of its own; "max error" is a peer's largest difference from psa attend on the peer's inputs.
"""
import argparse
import datetime
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import timeit

try:
    import numpy
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
except ImportError:
    torch = None
try:
    import onnx, onnxruntime
except ImportError:
    onnxruntime = None
sys.path.append("build/ggml")  # where make ggml puts it
try:
    import ggml
except ImportError:
    ggml = None

CALLS = 3
BLOCK = 128
TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
LARGEST_ERROR = {"torch.float32": 1e-4, "torch.float16": 2e-3, "torch.bfloat16": 2e-2}  # relative, L2
SPREAD = ("median", "min", "max")


def summary(rounds):
    """Of (median, min, max) per round: the median of medians, the least, the most."""
    medians, least, most = zip(*rounds)
    return statistics.median(medians), min(least), max(most)


def fail(message):
    print(f"bench_peers: {message}", file=sys.stderr)
    sys.exit(2)


class Row:
    """One row of the table; call computes attention, flop is what it takes, rounds are (median, min, max) seconds."""

    def __init__(self, name, call=None, density=0, flop=0, error=None):
        self.name, self.call, self.density, self.flop, self.error, self.rounds = name, call, density, flop, error, []

    def time_round(self):
        times = timeit.repeat(self.call, number=1, repeat=1 + CALLS)[1:]
        self.rounds.append((statistics.median(times), min(times), max(times)))

    def print(self, whole_call):
        median, least, most = summary(self.rounds)
        ratios = [ours[0] / psa[0] for ours, psa in zip(self.rounds, whole_call.rounds)]
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        error = "" if self.error is None else f"{self.error:.2g}"
        print(f"{'':15}{self.name:<19} {1e3 * median:10.3f} {1e3 * least:10.3f} {1e3 * most:10.3f} "
              f"{1e-9 * self.flop / median:8.1f} {self.density:8.4f} "
              f"{statistics.median(ratios):7.2f} {spread:<18}{error:>8}".rstrip())


def run_psa(args, *words):
    try:
        done = subprocess.run([args.psa, *words], capture_output=True, text=True)
    except OSError as error:
        fail(f"--psa {args.psa}: {error.strerror}; expected the psa program (make)")
    return done.stdout if done.returncode == 0 else fail(done.stderr.strip())


def psa_attend(tensors, args):
    """psa's output for these q, k, v and levels [1][heads][n / BLOCK][n / BLOCK]."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, x in zip(("q", "k", "v", "levels"), tensors):
            files += [f"--{name}", f"{folder}/{name}.npy"]
            numpy.save(files[-1], (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy())
        sizes = f"--block-q {BLOCK} --block-k {BLOCK} --threads {args.threads}".split()
        run_psa(args, "attend", *files, *sizes, "--out", f"{folder}/out.npy")
        return torch.from_numpy(numpy.load(f"{folder}/out.npy")).view(tensors[0].dtype)


def check(out, q, k, v, args, levels=None):
    """The largest difference from what psa makes of the same inputs, dense or by a map of whole blocks."""
    if levels is None:
        levels = torch.ones(1, args.heads, args.n // BLOCK, args.n // BLOCK, dtype=torch.uint8)
    expected = psa_attend((q, k, v, levels), args).double()
    error = out.double() - expected
    relative = (error.norm() / expected.norm()).item()
    if not relative < LARGEST_ERROR[str(q.dtype)]:
        raise RuntimeError(f"wrong result, relative error {relative:.3g}")
    return error.abs().max().item()


# The peers: each takes q, k, v [1][heads][n][d] and returns what to call, its density and its error.
def torch_sdpa(q, k, v, args):
    call = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return call, 1, check(call(), q, k, v, args)


def torch_flex(q, k, v, args):
    side = args.n // BLOCK
    kept = max(1, round(args.density * side))
    blocks = torch.rand(1, args.heads, side, side).argsort(-1).to(torch.int32)  # each row's first kept are seen
    blocks[..., :kept] = blocks[..., :kept].sort(-1).values
    count = torch.full(blocks.shape[:-1], kept, dtype=torch.int32)
    # All of them full blocks, none partial. A clone: the generated C++ does not compile when both lists are one tensor.
    mask = BlockMask.from_kv_blocks(torch.zeros_like(count), blocks.clone(), count, blocks, BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False)
    call = lambda: compiled(q, k, v, block_mask=mask)
    levels = torch.zeros(blocks.shape, dtype=torch.uint8).scatter(-1, blocks[..., :kept].long(), 1)
    return call, kept / side, check(call(), q, k, v, args, levels)


def onnx_attention(q, k, v, args):
    if onnxruntime is None:
        raise RuntimeError("onnx or onnxruntime is not installed")
    if args.type != "f32":
        raise RuntimeError("MultiHeadAttention on the CPU takes f32 only")
    make, shape, names = onnx.helper, (1, args.n, args.heads * q.shape[-1]), ("q", "k", "v", "out")
    node = make.make_node("MultiHeadAttention", names[:3], names[3:], domain="com.microsoft", num_heads=args.heads)
    info = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in names]
    opsets = [make.make_opsetid("", 17), make.make_opsetid("com.microsoft", 1)]
    graph = make.make_graph([node], "attention", info[:3], info[3:])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or idle threads slow the row that follows
    model = make.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    feed = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x.transpose(1, 2).reshape(shape).numpy())
            for name, x in zip(names, (q, k, v))}
    call = lambda: session.run_with_ort_values(None, feed)[0]
    out = torch.from_numpy(call().numpy()).view(1, args.n, args.heads, -1).transpose(1, 2)
    return call, 1, check(out, q, k, v, args)


def ggml_flash(kv_type, q, k, v, args):
    if ggml is None:
        raise RuntimeError("not found (make ggml)")
    q, k, v = (x.to(getattr(torch, TYPES[kind])) for x, kind in zip((q, k, v), ("f32", kv_type, kv_type)))
    out = torch.empty(1, args.n, args.heads, q.shape[-1])
    memory = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
    context = ggml.ggml_init(ggml.ggml_init_params(mem_size=memory, mem_buffer=None, no_alloc=True))

    def tensor(x):
        kind = ggml.GGML_TYPE_F32 if x.dtype == torch.float32 else ggml.GGML_TYPE_F16
        t = ggml.ggml_new_tensor_4d(context, kind, *reversed(x.shape))
        t.contents.data = x.data_ptr()
        return t

    node = ggml.ggml_flash_attn_ext(context, tensor(q), tensor(k), tensor(v), None, q.shape[-1] ** -0.5, 0, 0)
    node.contents.data = out.data_ptr()
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, node)
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, args.threads)

    def call(inputs=(q, k, v)):  # they must live as long as the graph
        if ggml.ggml_backend_graph_compute(backend, graph) != ggml.GGML_STATUS_SUCCESS:
            raise RuntimeError("ggml_backend_graph_compute failed")
        return out.transpose(1, 2)

    return call, 1, check(call(), q, k.float(), v.float(), args)


PEERS = {"torch SDPA": torch_sdpa, "torch FlexAttention": torch_flex, "onnxruntime MHA": onnx_attention,
         "ggml flash, K/V f32": functools.partial(ggml_flash, "f32"),
         "ggml flash, K/V f16": functools.partial(ggml_flash, "f16")}


def make_peers(d, args):
    kind = getattr(torch, TYPES[args.type])
    q, k, v, rows = *(torch.randn(1, args.heads, args.n, d).to(kind) for _ in range(3)), []
    for name, make in PEERS.items():
        try:
            call, density, error = make(q, k, v, args)
            rows.append(Row(name, call, density, 4 * args.n**2 * d * args.heads * density, error))
        except Exception as error:  # no compiler, operator or type: the other rows still count
            print(f"{args.n:7} {d:5}  {name} skipped: {' '.join(str(error).split())[:200]}")
    return rows


def psa_bench(n, d, args):
    command = (f"bench --topic call --json --n {n} --d {d} --heads {args.heads} --threads {args.threads} "
               f"--type {args.type} --density {args.density}")
    return json.loads(run_psa(args, *command.split()))


def add_psa_round(rows, d, args):
    found = {row["name"]: row for row in psa_bench(args.n, d, args)["rows"]}
    flop = {name: 1e9 * found[name]["gflops"] * found[name]["seconds"]["median"] for name in ("peak", "dense")}
    for row in rows:
        ours = found[row.name.removeprefix("psa ")]
        row.density = ours.get("density", 1)
        row.flop = flop["dense"] * row.density  # the whole call does attend's work and chooses it
        row.rounds.append(tuple(ours["seconds"][which] for which in SPREAD))
    return tuple(1e-9 * flop["peak"] / found["peak"]["seconds"][which] for which in ("median", "max", "min"))


def bench(d, args):
    psa, peers, peaks = [Row("psa " + name) for name in ("dense", "attend", "whole call")], make_peers(d, args), []
    for _ in range(args.repeats):
        peaks.append(add_psa_round(psa, d, args))
        for row in peers:
            row.time_round()
    peak, least, most = summary(peaks)
    print(f"{args.n:7} {d:5}  {'psa peak':<52} {peak:8.1f}  ({least:.1f} to {most:.1f})")
    for row in psa + peers:
        row.print(psa[-1])
    print(flush=True)


def print_header(args):
    ours = psa_bench(BLOCK, args.d, args)
    print(f"cpu       {ours['cpu']}\ndate      {datetime.date.today()}")
    print(f"versions  torch {torch.__version__}, onnxruntime {onnxruntime.__version__ if onnxruntime else 'none'}, "
          f"ggml {ggml.ggml_version().decode() if ggml else 'none'}")
    print(f"psa       {ours['isa']}, {ours['compiler']}, flags {ours['flags']}")
    print(f"run       {args.threads} threads, {args.type}, {args.heads} heads, one batch, {args.repeats} rounds")
    print("GFLOP/s   4*N*N*D*heads for dense rows, on the work done for sparse ones; peak: f32 multiply-add chains\n")
    print("      N     D                       median ms        min        max  GFLOP/s  density"
          " / whole call, by round  max error")


OPTIONS = [("--n", int, 4096, f"tokens, a multiple of {BLOCK}"), ("--d", str, "64,128", "head sizes"),
           ("--heads", int, 4, "heads"), ("--threads", int, 1, "threads"), ("--type", str, "f32", "f32, f16 or bf16"),
           ("--density", float, 0.15, "share of dense attention's multiply-adds"),
           ("--repeats", int, 7, "rounds"), ("--psa", str, "build/psa", "the psa program")]


def main():
    parser = argparse.ArgumentParser(description="psa beside PyTorch, ONNX Runtime and ggml, interleaved")
    for name, kind, default, text in OPTIONS:
        parser.add_argument(name, type=kind, default=default, help=f"{text}; default {default}")
    args = parser.parse_args()
    if args.n < BLOCK or args.n % BLOCK or args.repeats < 1 or args.type not in TYPES:
        fail(f"expected --n a multiple of {BLOCK}, --repeats 1 or more, --type f32, f16 or bf16")
    if torch is None:
        fail("torch is missing: pip install torch==2.15.0 onnx==1.23.2 onnxruntime==1.31.1")
    print_header(args)  # psa bench checks the other options
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    for d in map(int, args.d.split(",")):
        with torch.inference_mode():
            bench(d, args)


if __name__ == "__main__":
    main()
