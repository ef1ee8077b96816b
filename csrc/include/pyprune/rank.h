// Numerical rank of many small matrices: how many singular values exceed rtol * sigma_max.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pyprune/element.h"
#include "pyprune/pool.h"

namespace pyprune {

// One map [H, W] of a batch; strides count elements.
struct MapShape {
  std::ptrdiff_t H, W, stride_h, stride_w;
};

// static, here and wherever kernels look: no file may pick up another instruction set's copy of an inline function.
static inline std::ptrdiff_t short_side(const MapShape& s) {
  return s.H < s.W ? s.H : s.W;
}
static inline std::ptrdiff_t long_side(const MapShape& s) {
  return s.H < s.W ? s.W : s.H;
}

// A batch [N, C] of such maps.
struct Maps {
  const void* data;
  Element element;
  std::ptrdiff_t N, C, stride_n, stride_c;
  MapShape shape;
};

enum : std::int32_t {
  kRankNotFinite = -1,  // the map holds NaN or infinity
  kRankUndecided = -2,  // internal: neither bracket of sigma_max decided
};

constexpr int kMaxLanes = 16;

// One variant: `lanes` maps at a time, one per SIMD lane.
struct RankVariant {
  const char* name;
  const char* needs;  // instruction sets, in words
  bool (*supported)();
  int lanes;
  std::size_t (*workspace)(const MapShape&);  // bytes, for 64-byte aligned memory
  // maps[0..lanes): the maps' first elements. refine: narrow the bracket of sigma_max where its ends do not agree.
  // Returns whether a rank stays undecided.
  bool (*run)(const void* const* maps, const MapShape&, Element, double rtol, bool refine, void* workspace,
              std::int32_t* ranks);
  // From `slope` k <= short side + `offset` on, k maps are faster one at a time than in a block with idle lanes.
  std::ptrdiff_t inside_slope, inside_offset;
  std::size_t (*inside_workspace)(const MapShape&);
  // One map, its lanes along the Gram matrix; kRankUndecided where only the tridiagonal path helps.
  std::int32_t (*run_inside)(const void* map, const MapShape&, Element, double rtol, void* workspace);
  // For benchmarks: `rounds` times spin_width float64 multiply-adds and nothing else.
  std::ptrdiff_t spin_width;
  double (*spin)(std::int64_t rounds);
};

extern const RankVariant kRankBaseline, kRankAvx2, kRankAvx512;  // the latter two on x86-64 only

enum class Layout {
  automatic,  // whichever rank_layout names
  lanes,      // a map in each lane of a block
  inside,     // one map at a time
};

// The faster layout for a block of so many maps.
Layout rank_layout(const RankVariant&, const MapShape&, std::ptrdiff_t maps);

// Ranks of all maps, counted along [N, C], into ranks [N * C]. poll as in parallel_for: false if it stopped the work.
bool rank_maps(const Maps&, double rtol, const RankVariant&, Layout, int threads, std::int32_t* ranks, PoolPoll poll,
               void* poll_context);

// The slow, sure path for one map: float64 Gram matrix, Householder tridiagonalisation, Sturm counts.
std::size_t rank_tridiagonal_workspace(const MapShape&);  // doubles
std::int32_t rank_tridiagonal(const void* map, const MapShape&, Element, double rtol, double* workspace);

}  // namespace pyprune
