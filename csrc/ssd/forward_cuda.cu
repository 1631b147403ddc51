// Which form computes what, and into how many segments sequences are cut: a function of shape and dtype alone.
#include "ssd/forward.cuh"

namespace pyseq {
namespace {

constexpr int64_t kBlocksWanted = 132, kTokensAtLeast = 256;   // of an H200; of a segment

// A sequence that is cut computes most of its tokens twice, so it is where less than half of the GPU would have work.
Segments cut(const Ssd& s, bool chunks) {
  const int64_t blocks = chunks ? ssd_chunk_units(s) : ssd_scan_units(s) / 2;
  const int64_t time = s.sequences ? s.batch * s.time / s.sequences : 0, most = time / kTokensAtLeast;
  int64_t splits = s.exact || blocks * 2 > kBlocksWanted ? 1 : kBlocksWanted / (blocks ? blocks : 1);
  if (splits > most) splits = most;
  return {int(splits < 1 ? 1 : splits), nullptr, nullptr, nullptr};
}

// Memory of each part in turn, in floats: the addresses where `memory` is not null, and the size of all.
int64_t divide(const Ssd& s, bool chunks, float* memory, Segments& g) {
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    float* const begin = memory ? memory + used : nullptr;
    used += (size + 15) / 16 * 16;
    return begin;
  };
  if (g.splits > 1) {
    g.states = take(s.sequences * g.splits * s.heads * s.width * s.states);
    g.decays = take(s.sequences * g.splits * s.heads);
  }
  if (!chunks && ssd_scan_slices(s) > 1) g.partial = take(s.batch * s.time * s.heads * s.width);
  return used;
}

}  // namespace

int64_t ssd_forward_workspace(const Ssd& s) {
  const bool chunks = ssd_chunks_fit(s);
  Segments g = cut(s, chunks);
  return divide(s, chunks, nullptr, g);
}

int ssd_forward_cuda(const Ssd& s, void* stream) {
  if (s.sequences == 0 || s.heads == 0 || s.width == 0) return 0;
  for (const int64_t size : {s.batch, s.time, s.heads, s.width, s.states, s.sequences})
    if (size > kLongest) return cudaErrorInvalidValue;
  const bool chunks = ssd_chunks_fit(s);
  Segments g = cut(s, chunks);
  divide(s, chunks, s.workspace, g);
  const auto compute = chunks ? ssd_chunk_cuda : ssd_scan_cuda;
  if (g.splits > 1) {
    if (const int error = compute(s, g, false, stream)) return error;
    if (const int error = ssd_carry_cuda(s, g, stream)) return error;
  }
  return compute(s, g, true, stream);
}

}  // namespace pyseq
