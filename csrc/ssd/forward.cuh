// What the forms of the forward share: how sequences are cut in time, and who computes what.
//
// Where heads and sequences are too few to fill a GPU, a sequence is cut into segments, in three launches: every
// segment but the last from zeros, for the state it ends with; the states that segments begin with, one after another,
// since all of a segment multiplies the state by exp(A sum delta); every segment from there.
#pragma once
#include "ssd/update.cuh"

namespace pyseq {

struct Segments {
  int splits;       // segments of a sequence
  float* states;    // [S, splits, H, P, N]: what segments end with, and then what they begin with
  float* decays;    // [S, splits, H]: log2 of what a segment multiplies the state by
  float* partial;   // [B, T, H, P]: y of the slices before, where the general form needs more than one
};

// The general form: any dtypes and sizes, token by token in float32. The fused one: ssd_chunks_fit.
int64_t ssd_scan_units(const Ssd&);
int64_t ssd_scan_slices(const Ssd&);
int ssd_scan_cuda(const Ssd&, const Segments&, bool output, void* stream);
bool ssd_chunks_fit(const Ssd&);
int64_t ssd_chunk_units(const Ssd&);
int ssd_chunk_cuda(const Ssd&, const Segments&, bool output, void* stream);
int ssd_carry_cuda(const Ssd&, const Segments&, void* stream);

namespace {

constexpr int kQ = 64;   // tokens of a chunk; segments are whole chunks

struct Span {
  int begin, end;
  bool valid;
};

// The tokens of a segment of a sequence. Where cu_seqlens is not valid the sequences share all tokens, to write NaN.
__device__ __forceinline__ Span span_of(const Ssd& s, int sequence, int segment, int splits) {
  Span all{0, int(s.time), true};
  if (s.cu_seqlens) {
    all.valid = s.sequence_of[0] >= 0;
    all.begin = int(all.valid ? s.cu_seqlens[sequence] : s.time * sequence / s.sequences);
    all.end = int(all.valid ? s.cu_seqlens[sequence + 1] : s.time * (sequence + 1) / s.sequences);
  }
  if (splits == 1) return all;
  const int64_t piece = (int64_t(all.end - all.begin) + splits * kQ - 1) / (splits * kQ) * kQ, end = all.end;
  const int64_t begin = min(all.begin + segment * piece, end);
  return {int(begin), int(min(begin + piece, end)), all.valid};
}

}  // namespace
}  // namespace pyseq
