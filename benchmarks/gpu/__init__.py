"""`make gpu`: what only a GPU can tell about pyseq, in three parts that run alone.

    check      every CUDA test, random shapes, graphs, streams, offsets past 2^31, compute-sanitizer
    bench      what the card can do, and the timing tables beside the peers that import there
    profile    the hardware counters of the hottest kernels

Each part writes benchmarks/results/<card>/<part>.json after every item. With `--dry-run` the same code runs without a
GPU: on the emulator, at tiny shapes, for one round. Modules here import pyseq from the build for that card, so they run
with its folder first on Python's path: scripts/gpu.sh starts them.
"""
