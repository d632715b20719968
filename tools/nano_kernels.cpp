// What takes most of a training step on a CPU, forwards and backwards: attention and GELU. Needs
// AVX512-BF16; takes AMX where there is. See nano_kernels.py.
//
// Attention is that of a prefix whose positions all see each other, and of questions that see the
// prefix and, causally, themselves. Scores are held transposed, keys down and sixteen queries across:
// the largest score of a query, the sum of its exponentials and its gradients are then plain sums of
// vectors. Nothing of the size of queries times keys is ever written to memory.

// Of torch no more than is used: all of it (torch/extension.h) takes twice as long to compile.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <torch/csrc/utils/pybind.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kHead = 32;   // numbers of a head: one row of an AMX tile in bfloat16
constexpr int64_t kRow = 64;    // bytes of a tile's row
constexpr int64_t kBlock = 32;  // positions that are taken together
constexpr int64_t kLanes = 16;
using bf16 = uint16_t;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Eight tiles of 16 rows of 64 bytes, for as long as this lives, and their products: rows of 16 pairs
// of bfloat16 times 16 pairs of rows, added to rows of 16 floats. Those of a CPU with AMX. Inline
// assembly, because GCC's own calls take no number of a tile that is a template's.
struct AmxTiles {
  AmxTiles() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = kRow, config.rows[tile] = 16;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~AmxTiles() { asm volatile("tilerelease" ::); }
  template <int tile>
  void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
  }
  template <int sum, int left, int right>
  void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
  }
};

// The same by vectors.
class VectorTiles {
 public:
  template <int tile>
  void zero() {
    for (int row = 0; row < 16; ++row) _mm512_store_si512(tiles_[tile][row], _mm512_setzero_si512());
  }
  template <int tile>
  void load(const void* from, int64_t stride) {
    for (int row = 0; row < 16; ++row)
      _mm512_store_si512(tiles_[tile][row],
                         _mm512_loadu_si512(static_cast<const char*>(from) + row * stride));
  }
  template <int tile>
  void store(void* to, int64_t stride) {
    for (int row = 0; row < 16; ++row)
      _mm512_storeu_si512(static_cast<char*>(to) + row * stride, _mm512_load_si512(tiles_[tile][row]));
  }
  template <int sum, int left, int right>
  void add_product() {
    __m512 sums[16];
    for (int row = 0; row < 16; ++row) sums[row] = _mm512_load_ps(tiles_[sum][row]);
    for (int pair = 0; pair < 16; ++pair) {
      const __m512bh across = (__m512bh)_mm512_load_si512(tiles_[right][pair]);
#pragma GCC unroll 16
      for (int row = 0; row < 16; ++row) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(tiles_[left][row][pair]);
        sums[row] = _mm512_dpbf16_ps(sums[row], both, across);
      }
    }
    for (int row = 0; row < 16; ++row) _mm512_store_ps(tiles_[sum][row], sums[row]);
  }

 private:
  alignas(64) int32_t tiles_[8][16][16];
};

bool amx = false;  // whether tiles are AMX's

// Tiles are taken by AMX from now on, where Linux gives them to this process; else by vectors.
bool take_amx(bool wanted) {
  constexpr int kRequest = 0x1023, kTileData = 18;
  amx = wanted && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return amx;
}

template <typename Work>
void with_tiles(const Work& work) {
  if (amx) {
    AmxTiles tiles;
    work(tiles);
  } else {
    VectorTiles tiles;
    work(tiles);
  }
}

inline int64_t padded(int64_t length) { return (length + kBlock - 1) / kBlock * kBlock; }

// Where the prefix and the questions lie once each is padded to whole blocks.
struct Layout {
  int64_t prefix, questions, length, prefix_padded, length_padded, total;
  Layout(int64_t positions, int64_t prefix_, int64_t questions_)
      : prefix(prefix_), questions(questions_) {
    length = questions ? (positions - prefix) / questions : 0;
    prefix_padded = padded(prefix);
    length_padded = padded(length);
    total = prefix_padded + questions * length_padded;
  }
  int64_t segments() const { return 1 + questions; }
  int64_t first(int64_t segment) const {
    return segment ? prefix + (segment - 1) * length : 0;
  }
  int64_t size(int64_t segment) const { return segment ? length : prefix; }
  int64_t place(int64_t segment) const {
    return segment ? prefix_padded + (segment - 1) * length_padded : 0;
  }
};

struct Buffer {  // 64-byte aligned, zero at first
  void* data;
  explicit Buffer(int64_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    TORCH_CHECK(data != nullptr, "out of memory");
    std::memset(data, 0, bytes);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  template <typename T>
  T* as() {
    return static_cast<T*>(data);
  }
};

constexpr float kLog2e = 1.44269504f;
constexpr float kNever = -1e30f;  // the score of what is not seen: its power of two is 0

// 2^x: a polynomial of what lies above the whole number below (Chebyshev's of degree 5, within 2e-7).
inline __m512 power_of_two(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 9);
  __m512 y = _mm512_set1_ps(1.895107291e-03f);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.946214666e-03f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.586328266e-02f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.401407701e-01f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.931546200e-01f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.999998958e-01f));
  return _mm512_scalef_ps(y, x);
}

inline __m512i two_rows(__m512 first, __m512 second) {  // bfloat16: all of the first, then the second
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

inline __m512i interleaved(__m512i halves) {  // a0..a15 b0..b15 -> a0 b0 a1 b1 ...
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// 16 x 16 dwords, rows of `from` to columns of `to`.
inline void transpose16(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

// One head's rows, [positions, 32] at a stride, put where the layout has them; the rest stays 0.
void gather(const Layout& at, const bf16* from, int64_t stride, bf16* to) {
  for (int64_t segment = 0; segment < at.segments(); ++segment)
    for (int64_t row = 0; row < at.size(segment); ++row)
      std::memcpy(to + (at.place(segment) + row) * kHead, from + (at.first(segment) + row) * stride,
                  kRow);
}

// Rows [total, 32] -> for each 16 of them [16 pairs of numbers, 16 rows]: the right side of a
// product whose columns are those rows.
void across(int64_t total, const bf16* rows, bf16* to) {
  for (int64_t row = 0; row < total; row += kLanes)
    transpose16(reinterpret_cast<const uint32_t*>(rows + row * kHead), kHead / 2,
                reinterpret_cast<uint32_t*>(to + row * kHead), kLanes);
}

// Rows [total, 32] -> for each 32 of them two tiles of [16 pairs of rows, 16 columns]: the right
// side of a product that sums over those rows.
void paired(int64_t total, const bf16* rows, bf16* to) {
  for (int64_t row = 0; row < total; row += 2) {
    const __m512i one = _mm512_load_si512(rows + row * kHead);
    const __m512i two = _mm512_load_si512(rows + (row + 1) * kHead);
    bf16* block = to + row / kBlock * kBlock * kHead + row % kBlock / 2 * kHead;
    const __m512i low = _mm512_inserti64x4(one, _mm512_castsi512_si256(two), 1);
    const __m512i high = _mm512_inserti64x4(two, _mm512_extracti64x4_epi64(one, 1), 0);
    _mm512_store_si512(block, interleaved(low));
    _mm512_store_si512(block + 16 * kHead, interleaved(high));
  }
}

// Rows [total, 32] -> [32, total]: the left side of a product that sums over those rows.
void upright(int64_t total, const bf16* rows, bf16* to) {
  alignas(64) uint32_t pairs[16 * 16];
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34,
                                        32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  for (int64_t row = 0; row < total; row += kLanes) {
    transpose16(reinterpret_cast<const uint32_t*>(rows + row * kHead), kHead / 2, pairs, kLanes);
    for (int64_t pair = 0; pair < 16; ++pair) {
      const __m512i both = _mm512_load_si512(pairs + pair * kLanes);
      const __m512i zero = _mm512_setzero_si512();
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 2 * pair * total + row),
                         _mm512_castsi512_si256(_mm512_permutex2var_epi16(both, even, zero)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + (2 * pair + 1) * total + row),
                         _mm512_castsi512_si256(_mm512_permutex2var_epi16(both, odd, zero)));
    }
  }
}

// The blocks of keys that a block of queries sees, and which keys of each.
struct Seen {
  const Layout& at;
  int64_t segment, row;  // of the block's first query, within its segment
  int64_t blocks() const {
    return at.prefix_padded / kBlock + (segment ? row / kBlock + 1 : 0);
  }
  int64_t place(int64_t block) const {
    const int64_t of_prefix = at.prefix_padded / kBlock;
    return block < of_prefix ? block * kBlock : at.place(segment) + (block - of_prefix) * kBlock;
  }
  // Queries that see this key: bit n stands for the n-th of the sixteen from `row` + `lane` on.
  __mmask16 queries(int64_t block, int64_t key, int64_t lane) const {
    const int64_t of_prefix = at.prefix_padded / kBlock;
    if (block < of_prefix) return block * kBlock + key < at.prefix ? 0xffff : 0;
    const int64_t from = (block - of_prefix) * kBlock + key - (row + lane);
    return from <= 0 ? 0xffff : from >= kLanes ? 0 : static_cast<__mmask16>(0xffff << from);
  }
  bool whole(int64_t block) const { return (block + 1) * kBlock <= at.prefix; }
};

template <typename Tiles>
void forwards(Tiles& tiles, const Layout& at, const bf16* q, const bf16* k, const bf16* v, int64_t q_stride,
              int64_t k_stride, int64_t v_stride, bf16* out, int64_t out_stride, float* lse) {
  const int64_t bytes = at.total * kRow;
  Buffer rows(bytes), keys(bytes), queries(bytes), values(bytes);
  gather(at, v, v_stride, rows.as<bf16>());
  upright(at.total, rows.as<bf16>(), values.as<bf16>());
  gather(at, q, q_stride, rows.as<bf16>());
  across(at.total, rows.as<bf16>(), queries.as<bf16>());
  gather(at, k, k_stride, keys.as<bf16>());
  const int64_t most = at.prefix_padded + at.length_padded;
  Buffer score_buffer(most * kLanes * 4), weight_buffer(most * kLanes * 2);
  float* scores = score_buffer.as<float>();
  bf16* weights = weight_buffer.as<bf16>();
  alignas(64) float heard[kHead * kLanes], turned[kLanes * kHead];
  const __m512 never = _mm512_set1_ps(kNever), log2e = _mm512_set1_ps(kLog2e);
  for (int64_t segment = 0; segment < at.segments(); ++segment) {
    for (int64_t row = 0; row < at.size(segment); row += kLanes) {
      const int64_t lane = row % kBlock;
      const Seen seen{at, segment, row - lane};
      tiles.template load<6>(queries.as<bf16>() + (at.place(segment) + row) * kHead, kRow);
      __m512 largest = never;
      for (int64_t block = 0; block < seen.blocks(); ++block) {
        float* here = scores + block * kBlock * kLanes;
        const bf16* from = keys.as<bf16>() + seen.place(block) * kHead;
        tiles.template zero<0>();
        tiles.template load<4>(from, kRow);
        tiles.template add_product<0, 4, 6>();
        tiles.template store<0>(here, kRow);
        tiles.template zero<1>();
        tiles.template load<5>(from + kLanes * kHead, kRow);
        tiles.template add_product<1, 5, 6>();
        tiles.template store<1>(here + kLanes * kLanes, kRow);
      }
      for (int64_t block = 0; block < seen.blocks(); ++block) {
        float* here = scores + block * kBlock * kLanes;
        const bool whole = seen.whole(block);
        for (int64_t key = 0; key < kBlock; ++key) {
          __m512 score = _mm512_load_ps(here + key * kLanes);
          if (!whole) {
            score = _mm512_mask_mov_ps(never, seen.queries(block, key, lane), score);
            _mm512_store_ps(here + key * kLanes, score);
          }
          largest = _mm512_max_ps(largest, score);
        }
      }
      __m512 total = _mm512_setzero_ps();
      const __m512 top = _mm512_mul_ps(largest, log2e);
      const int64_t count = seen.blocks() * kBlock;
      for (int64_t key = 0; key < count; key += 2) {
        const float* here = scores + key * kLanes;
        const __m512 weight_a = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(here), log2e, top));
        const __m512 weight_b =
            power_of_two(_mm512_fmsub_ps(_mm512_load_ps(here + kLanes), log2e, top));
        total = _mm512_add_ps(total, _mm512_add_ps(weight_a, weight_b));
        _mm512_store_si512(weights + key * kLanes, interleaved(two_rows(weight_a, weight_b)));
      }
      tiles.template zero<0>();
      tiles.template zero<1>();
      for (int64_t block = 0; block < seen.blocks(); ++block) {
        const bf16* from = values.as<bf16>() + seen.place(block);
        tiles.template load<4>(from, at.total * 2);
        tiles.template load<5>(from + 16 * at.total, at.total * 2);
        tiles.template load<7>(weights + block * kBlock * kLanes, kRow);
        tiles.template add_product<0, 4, 7>();
        tiles.template add_product<1, 5, 7>();
      }
      tiles.template store<0>(heard, kRow);
      tiles.template store<1>(heard + kLanes * kLanes, kRow);
      const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), total);
      for (int64_t dim = 0; dim < kHead; ++dim)
        _mm512_store_ps(heard + dim * kLanes,
                        _mm512_mul_ps(_mm512_load_ps(heard + dim * kLanes), share));
      for (int64_t half = 0; half < 2; ++half)
        transpose16(reinterpret_cast<uint32_t*>(heard + half * kLanes * kLanes), kLanes,
                    reinterpret_cast<uint32_t*>(turned + half * kLanes), kHead);
      const int64_t left = std::min(kLanes, at.size(segment) - row);
      const int64_t first = at.first(segment) + row;
      for (int64_t n = 0; n < left; ++n)
        _mm512_storeu_si512(out + (first + n) * out_stride,
                            two_rows(_mm512_load_ps(turned + n * kHead),
                                     _mm512_load_ps(turned + n * kHead + kLanes)));
      alignas(64) float sums[kLanes], tops[kLanes];
      _mm512_store_ps(sums, total);
      _mm512_store_ps(tops, largest);
      for (int64_t n = 0; n < left; ++n) lse[first + n] = tops[n] + std::log(sums[n]);
    }
  }
}

inline __m512 widened(const bf16* from, __mmask16 there = 0xffff) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
}

void scatter(const Layout& at, const float* from, bf16* to, int64_t stride) {
  for (int64_t segment = 0; segment < at.segments(); ++segment)
    for (int64_t row = 0; row < at.size(segment); ++row) {
      const float* here = from + (at.place(segment) + row) * kHead;
      _mm512_storeu_si512(to + (at.first(segment) + row) * stride,
                          two_rows(_mm512_load_ps(here), _mm512_load_ps(here + kLanes)));
    }
}

struct Head {  // what one head of one scene reads and writes; strides of positions
  const bf16 *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  const float* lse;
  const bf16 *out, *grad;
  bf16 *grad_q, *grad_k, *grad_v;
  int64_t stride;  // of the last five
};

template <typename Tiles>
void backwards(Tiles& tiles, const Layout& at, const Head& head) {
  const int64_t bytes = at.total * kRow;
  Buffer rows(bytes), keys(bytes), values(bytes);
  Buffer queries(bytes), query_pairs(bytes), grads(bytes), grad_pairs(bytes), keys_upright(bytes);
  gather(at, head.q, head.q_stride, rows.as<bf16>());
  across(at.total, rows.as<bf16>(), queries.as<bf16>());
  paired(at.total, rows.as<bf16>(), query_pairs.as<bf16>());
  gather(at, head.grad, head.stride, rows.as<bf16>());
  across(at.total, rows.as<bf16>(), grads.as<bf16>());
  paired(at.total, rows.as<bf16>(), grad_pairs.as<bf16>());
  gather(at, head.k, head.k_stride, keys.as<bf16>());
  upright(at.total, keys.as<bf16>(), keys_upright.as<bf16>());
  gather(at, head.v, head.v_stride, values.as<bf16>());
  // Rows that are padding weigh nothing: so large is what their scores are reduced by.
  Buffer norm_buffer(at.total * 4), delta_buffer(at.total * 4);
  float *norms = norm_buffer.as<float>(), *deltas = delta_buffer.as<float>();
  std::fill(norms, norms + at.total, -kNever);
  for (int64_t segment = 0; segment < at.segments(); ++segment)
    for (int64_t row = 0; row < at.size(segment); ++row) {
      const int64_t from = at.first(segment) + row, to = at.place(segment) + row;
      const bf16 *o = head.out + from * head.stride, *g = head.grad + from * head.stride;
      norms[to] = head.lse[from] * kLog2e;
      deltas[to] = _mm512_reduce_add_ps(
          _mm512_fmadd_ps(widened(o), widened(g),
                          _mm512_mul_ps(widened(o + kLanes), widened(g + kLanes))));
    }
  Buffer made_q(2 * bytes), made_k(2 * bytes), made_v(2 * bytes);
  const __m512 log2e = _mm512_set1_ps(kLog2e);
  alignas(64) float scores[2][kBlock * kLanes], slopes[2][kBlock * kLanes];
  alignas(64) bf16 weights[kBlock * kBlock], steps[kBlock * kBlock], step_pairs[2][kBlock * kLanes];
  alignas(64) float turned[2][2][kLanes * kLanes];
  for (int64_t segment = 0; segment < at.segments(); ++segment) {
    for (int64_t row = 0; row < at.size(segment); row += kBlock) {
      const Seen seen{at, segment, row};
      const int64_t place = at.place(segment) + row;
      const bf16 *q_here = queries.as<bf16>() + place * kHead, *g_here = grads.as<bf16>() + place * kHead;
      const bf16* q_pairs = query_pairs.as<bf16>() + place * kHead;
      const bf16* g_pairs = grad_pairs.as<bf16>() + place * kHead;
      const __m512 norm0 = _mm512_load_ps(norms + place), norm1 = _mm512_load_ps(norms + place + kLanes);
      const __m512 delta0 = _mm512_load_ps(deltas + place);
      const __m512 delta1 = _mm512_load_ps(deltas + place + kLanes);
      // Tiles 0 to 3 hold the gradient of these queries, turned: [32 numbers, 32 queries].
      tiles.template zero<0>();
      tiles.template zero<1>();
      tiles.template zero<2>();
      tiles.template zero<3>();
      for (int64_t block = 0; block < seen.blocks(); ++block) {
        const int64_t from = seen.place(block);
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t start = half * kLanes * kLanes;
          tiles.template load<6>(keys.as<bf16>() + (from + half * kLanes) * kHead, kRow);
          tiles.template zero<4>();
          tiles.template load<7>(q_here, kRow);
          tiles.template add_product<4, 6, 7>();
          tiles.template store<4>(scores[0] + start, kRow);
          tiles.template zero<5>();
          tiles.template load<7>(q_here + kLanes * kHead, kRow);
          tiles.template add_product<5, 6, 7>();
          tiles.template store<5>(scores[1] + start, kRow);
          tiles.template load<6>(values.as<bf16>() + (from + half * kLanes) * kHead, kRow);
          tiles.template zero<4>();
          tiles.template load<7>(g_here, kRow);
          tiles.template add_product<4, 6, 7>();
          tiles.template store<4>(slopes[0] + start, kRow);
          tiles.template zero<5>();
          tiles.template load<7>(g_here + kLanes * kHead, kRow);
          tiles.template add_product<5, 6, 7>();
          tiles.template store<5>(slopes[1] + start, kRow);
        }
        const bool whole = seen.whole(block);
        for (int64_t key = 0; key < kBlock; key += 2) {
          __m512 step[2][2];
          for (int64_t n = 0; n < 2; ++n) {
            const int64_t here = (key + n) * kLanes;
            __m512 p0 = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores[0] + here), log2e, norm0));
            __m512 p1 = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores[1] + here), log2e, norm1));
            if (!whole) {
              p0 = _mm512_maskz_mov_ps(seen.queries(block, key + n, 0), p0);
              p1 = _mm512_maskz_mov_ps(seen.queries(block, key + n, kLanes), p1);
            }
            step[n][0] = _mm512_mul_ps(p0, _mm512_sub_ps(_mm512_load_ps(slopes[0] + here), delta0));
            step[n][1] = _mm512_mul_ps(p1, _mm512_sub_ps(_mm512_load_ps(slopes[1] + here), delta1));
            _mm512_store_si512(weights + (key + n) * kBlock, two_rows(p0, p1));
            _mm512_store_si512(steps + (key + n) * kBlock, two_rows(step[n][0], step[n][1]));
          }
          for (int64_t side = 0; side < 2; ++side)
            _mm512_store_si512(step_pairs[side] + key * kLanes,
                               interleaved(two_rows(step[0][side], step[1][side])));
        }
        tiles.template load<6>(keys_upright.as<bf16>() + from, at.total * 2);
        tiles.template load<7>(keys_upright.as<bf16>() + 16 * at.total + from, at.total * 2);
        tiles.template load<4>(step_pairs[0], kRow);
        tiles.template load<5>(step_pairs[1], kRow);
        tiles.template add_product<0, 6, 4>();
        tiles.template add_product<1, 6, 5>();
        tiles.template add_product<2, 7, 4>();
        tiles.template add_product<3, 7, 5>();
        for (int64_t half = 0; half < 2; ++half) {
          float* to_v = made_v.as<float>() + (from + half * kLanes) * kHead;
          float* to_k = made_k.as<float>() + (from + half * kLanes) * kHead;
          tiles.template load<6>(weights + half * kLanes * kBlock, kRow);
          tiles.template load<4>(to_v, 2 * kRow);
          tiles.template load<7>(g_pairs, kRow);
          tiles.template add_product<4, 6, 7>();
          tiles.template store<4>(to_v, 2 * kRow);
          tiles.template load<5>(to_v + kLanes, 2 * kRow);
          tiles.template load<7>(g_pairs + 16 * kHead, kRow);
          tiles.template add_product<5, 6, 7>();
          tiles.template store<5>(to_v + kLanes, 2 * kRow);
          tiles.template load<6>(steps + half * kLanes * kBlock, kRow);
          tiles.template load<4>(to_k, 2 * kRow);
          tiles.template load<7>(q_pairs, kRow);
          tiles.template add_product<4, 6, 7>();
          tiles.template store<4>(to_k, 2 * kRow);
          tiles.template load<5>(to_k + kLanes, 2 * kRow);
          tiles.template load<7>(q_pairs + 16 * kHead, kRow);
          tiles.template add_product<5, 6, 7>();
          tiles.template store<5>(to_k + kLanes, 2 * kRow);
        }
      }
      tiles.template store<0>(turned[0][0], kRow);
      tiles.template store<1>(turned[0][1], kRow);
      tiles.template store<2>(turned[1][0], kRow);
      tiles.template store<3>(turned[1][1], kRow);
      for (int64_t dims = 0; dims < 2; ++dims)
        for (int64_t side = 0; side < 2; ++side)
          transpose16(reinterpret_cast<uint32_t*>(turned[dims][side]), kLanes,
                      reinterpret_cast<uint32_t*>(made_q.as<float>() + (place + side * kLanes) * kHead +
                                                  dims * kLanes),
                      kHead);
    }
  }
  scatter(at, made_q.as<float>(), head.grad_q, head.stride);
  scatter(at, made_k.as<float>(), head.grad_k, head.stride);
  scatter(at, made_v.as<float>(), head.grad_v, head.stride);
}

const bf16* read(const at::Tensor& t, int64_t scene, int64_t head) {
  return reinterpret_cast<const bf16*>(t.data_ptr()) + scene * t.stride(0) + head * t.stride(1);
}

at::Tensor rows_of(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

// What attention takes; its layout.
Layout checked(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t prefix,
               int64_t questions) {
  for (const at::Tensor* t : {&q, &k, &v})
    TORCH_CHECK(t->dim() == 4 && t->size(3) == kHead && t->scalar_type() == at::kBFloat16 &&
                    t->device().is_cpu() && t->sizes() == q.sizes(),
                "attention takes bfloat16 [B, H, N, 32] on the CPU");
  const int64_t others = q.size(2) - prefix;
  TORCH_CHECK(prefix > 0 && others >= 0 && (questions ? others % questions : others) == 0,
              "positions are those of the prefix and of questions of one length");
  return Layout(q.size(2), prefix, questions);
}

std::vector<at::Tensor> attend(const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
                               int64_t prefix, int64_t questions) {
  const Layout at = checked(q_, k_, v_, prefix, questions);
  const at::Tensor q = rows_of(q_), k = rows_of(k_), v = rows_of(v_);
  const int64_t scenes = q.size(0), heads = q.size(1), positions = q.size(2);
  at::Tensor out = at::empty({scenes, positions, heads, kHead}, q.options());
  at::Tensor lse = at::empty({scenes, heads, positions}, q.options().dtype(at::kFloat));
  at::parallel_for(0, scenes * heads, 1, [&](int64_t begin, int64_t end) {
    with_tiles([&](auto& tiles) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t s = n / heads, h = n % heads;
        bf16* to = reinterpret_cast<bf16*>(out.data_ptr()) + s * positions * heads * kHead + h * kHead;
        forwards(tiles, at, read(q, s, h), read(k, s, h), read(v, s, h), q.stride(2), k.stride(2),
                 v.stride(2), to, heads * kHead, lse.data_ptr<float>() + n * positions);
      }
    });
  });
  return {out, lse};
}

std::vector<at::Tensor> attend_backwards(const at::Tensor& grad_, const at::Tensor& q_,
                                         const at::Tensor& k_, const at::Tensor& v_,
                                         const at::Tensor& out, const at::Tensor& lse, int64_t prefix,
                                         int64_t questions) {
  const Layout at = checked(q_, k_, v_, prefix, questions);
  const at::Tensor q = rows_of(q_), k = rows_of(k_), v = rows_of(v_);
  const at::Tensor grad = grad_.contiguous();  // [B, N, H, 32], as what was given
  const int64_t scenes = q.size(0), heads = q.size(1), positions = q.size(2);
  std::vector<at::Tensor> made;
  for (int n = 0; n < 3; ++n) made.push_back(at::empty({scenes, positions, heads, kHead}, q.options()));
  const int64_t stride = heads * kHead;
  at::parallel_for(0, scenes * heads, 1, [&](int64_t begin, int64_t end) {
    with_tiles([&](auto& tiles) {
      for (int64_t n = begin; n < end; ++n) {
        const int64_t s = n / heads, h = n % heads, to = s * positions * stride + h * kHead;
        const auto at_head = [&](const at::Tensor& t) {
          return reinterpret_cast<bf16*>(t.data_ptr()) + to;
        };
        backwards(tiles, at,
                  Head{read(q, s, h), read(k, s, h), read(v, s, h), q.stride(2), k.stride(2),
                       v.stride(2), lse.data_ptr<float>() + n * positions, at_head(out), at_head(grad),
                       at_head(made[0]), at_head(made[1]), at_head(made[2]), stride});
      }
    });
  });
  return made;
}

// GELU, tanh form: x / (1 + exp(-z)), z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float kLinear = 1.5957691216f, kCubic = 0.0713548163f;

inline __m512 logistic(__m512 x, __m512 squared) {
  const __m512 z = _mm512_mul_ps(
      x, _mm512_fmadd_ps(squared, _mm512_set1_ps(kCubic * -kLog2e), _mm512_set1_ps(kLinear * -kLog2e)));
  const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(126.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, power_of_two(_mm512_min_ps(z, most))));
}

inline __m512 gelu_of(__m512 x) { return _mm512_mul_ps(x, logistic(x, _mm512_mul_ps(x, x))); }

inline __m512 gelu_slope(__m512 x) {
  const __m512 squared = _mm512_mul_ps(x, x), one = _mm512_set1_ps(1.0f);
  const __m512 share = logistic(x, squared);
  const __m512 steep = _mm512_mul_ps(
      x, _mm512_fmadd_ps(squared, _mm512_set1_ps(3 * kCubic), _mm512_set1_ps(kLinear)));
  return _mm512_mul_ps(share, _mm512_fmadd_ps(steep, _mm512_sub_ps(one, share), one));
}

// `made` of each number of x, 32 at a time by the cores, then of what is left over.
template <typename Made>
void each(const at::Tensor& x, at::Tensor& to, const Made& made) {
  bf16* out = reinterpret_cast<bf16*>(to.data_ptr());
  const int64_t count = x.numel(), whole = count / kBlock;
  at::parallel_for(0, whole, 512, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kBlock; n < end * kBlock; n += kBlock)
      _mm512_storeu_si512(out + n, two_rows(made(n), made(n + kLanes)));
  });
  for (int64_t n = whole * kBlock; n < count; n += kLanes) {
    const __mmask16 there = 0xffff >> (kLanes - std::min(kLanes, count - n));
    const __m512 last = made(n, there);
    _mm256_mask_storeu_epi16(out + n, there, _mm512_castsi512_si256(two_rows(last, last)));
  }
}

struct Gelu {
  const bf16* x;
  __m512 operator()(int64_t n, __mmask16 there = 0xffff) const {
    return gelu_of(widened(x + n, there));
  }
};

struct GeluGradient {
  const bf16 *grad, *x;
  __m512 operator()(int64_t n, __mmask16 there = 0xffff) const {
    return _mm512_mul_ps(widened(grad + n, there), gelu_slope(widened(x + n, there)));
  }
};

const bf16* numbers(const at::Tensor& t) {
  TORCH_CHECK(t.scalar_type() == at::kBFloat16 && t.device().is_cpu() && t.is_contiguous(),
              "GELU takes contiguous bfloat16 on the CPU");
  return reinterpret_cast<const bf16*>(t.data_ptr());
}

at::Tensor gelu(const at::Tensor& x_) {
  const at::Tensor x = x_.contiguous();
  at::Tensor made = at::empty_like(x);
  each(x, made, Gelu{numbers(x)});
  return made;
}

at::Tensor gelu_backwards(const at::Tensor& grad_, const at::Tensor& x_) {
  const at::Tensor grad = grad_.contiguous(), x = x_.contiguous();
  at::Tensor made = at::empty_like(x);
  each(x, made, GeluGradient{numbers(grad), numbers(x)});
  return made;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("attend", &attend, py::call_guard<py::gil_scoped_release>());
  m.def("attend_backwards", &attend_backwards, py::call_guard<py::gil_scoped_release>());
  m.def("gelu", &gelu, py::call_guard<py::gil_scoped_release>());
  m.def("gelu_backwards", &gelu_backwards, py::call_guard<py::gil_scoped_release>());
  m.def("take_amx", &take_amx);
}
