// y = ((x * before) S^T) * after on a CPU, S of 1 bit a weight: see __init__.py for its order.
//
// With AVX-512 the bits of a row are masks, 16 for a register, by which inputs are added: twice that
// is taken from the sum of all inputs. Elsewhere they flip the signs of inputs. Each register of
// inputs serves several rows of S, whose sums are independent of each other, so that no addition
// waits for the one before it. Rows are short: what is read is asked for ahead, since a processor
// follows no stream over the end of a page by itself.

#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kRows = 4;       // of S at once
constexpr int kLanes = 8;          // sums side by side, of a byte's inputs
constexpr int64_t kPadding = 64;   // inputs: more than a register holds
constexpr int64_t kLine = 64;      // bytes of signs that are asked for at once
constexpr int64_t kAhead = 8192;   // bytes before they are read
constexpr int64_t kSmall = 1 << 19;  // weights, below which one thread is faster than several

#if defined(__AVX512F__) || defined(__AVX2__)
// The lines of `count` rows that are read kAhead bytes from here.
inline void ask(const uint8_t* signs, int64_t bytes, int count) {
  for (int r = 0; r < count; ++r) {
    const uintptr_t there = reinterpret_cast<uintptr_t>(signs + r * bytes) + kAhead;
    _mm_prefetch(reinterpret_cast<const char*>(there), _MM_HINT_T0);  // past the end it does nothing
  }
}
#endif

// The sums of `count` (at most kRows) rows of S over the scaled inputs, which are 0 past the last.
#if defined(__AVX512F__)

template <int count>
void sums(const float* x, float whole, const uint8_t* signs, int64_t bytes, float* found) {
  __m512 total[count][2];  // of the inputs whose bit is 1
  for (int r = 0; r < count; ++r) total[r][0] = total[r][1] = _mm512_setzero_ps();
  int64_t at = 0;
  for (; at + 4 <= bytes; at += 4) {
    if (at % kLine == 0) ask(signs + at, bytes, count);
    const __m512 first = _mm512_loadu_ps(x + 8 * at), second = _mm512_loadu_ps(x + 8 * at + 16);
    for (int r = 0; r < count; ++r) {
      uint16_t masks[2];
      std::memcpy(masks, signs + r * bytes + at, 4);
      total[r][0] = _mm512_mask_add_ps(total[r][0], masks[0], total[r][0], first);
      total[r][1] = _mm512_mask_add_ps(total[r][1], masks[1], total[r][1], second);
    }
  }
  for (; at < bytes; at += 2) {
    const __m512 value = _mm512_loadu_ps(x + 8 * at);
    for (int r = 0; r < count; ++r) {
      const uint8_t* byte = signs + r * bytes + at;
      const uint16_t mask = static_cast<uint16_t>(byte[0] | (at + 1 < bytes ? byte[1] << 8 : 0));
      total[r][0] = _mm512_mask_add_ps(total[r][0], mask, total[r][0], value);
    }
  }
  for (int r = 0; r < count; ++r) {
    found[r] = whole - 2 * _mm512_reduce_add_ps(_mm512_add_ps(total[r][0], total[r][1]));
  }
}

#elif defined(__AVX2__)

template <int count>
void sums(const float* x, float, const uint8_t* signs, int64_t bytes, float* found) {
  __m256 total[count];
  for (int r = 0; r < count; ++r) total[r] = _mm256_setzero_ps();
  const __m256i highest = _mm256_set1_epi32(INT32_MIN);
  const __m256i places = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  int64_t at = 0;
  for (; at + 4 <= bytes; at += 4) {
    if (at % kLine == 0) ask(signs + at, bytes, count);
    __m256i word[count];
    for (int r = 0; r < count; ++r) {
      int32_t held;
      std::memcpy(&held, signs + r * bytes + at, 4);
      word[r] = _mm256_set1_epi32(held);
    }
    for (int part = 0; part < 4; ++part) {
      const __m256i value = _mm256_castps_si256(_mm256_loadu_ps(x + 8 * (at + part)));
      const __m256i shift = _mm256_sub_epi32(places, _mm256_set1_epi32(8 * part));
      for (int r = 0; r < count; ++r) {
        const __m256i sign = _mm256_and_si256(_mm256_sllv_epi32(word[r], shift), highest);
        total[r] = _mm256_add_ps(total[r], _mm256_castsi256_ps(_mm256_xor_si256(value, sign)));
      }
    }
  }
  for (; at < bytes; ++at) {
    const __m256i value = _mm256_castps_si256(_mm256_loadu_ps(x + 8 * at));
    for (int r = 0; r < count; ++r) {
      const __m256i word = _mm256_set1_epi32(signs[r * bytes + at]);
      const __m256i sign = _mm256_and_si256(_mm256_sllv_epi32(word, places), highest);
      total[r] = _mm256_add_ps(total[r], _mm256_castsi256_ps(_mm256_xor_si256(value, sign)));
    }
  }
  for (int r = 0; r < count; ++r) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(total[r]), _mm256_extractf128_ps(total[r], 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    found[r] = _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
}

#else

template <int count>
void sums(const float* x, float, const uint8_t* signs, int64_t bytes, float* found) {
  for (int r = 0; r < count; ++r) {
    float total[8] = {};
    for (int64_t at = 0; at < bytes; ++at) {
      const uint32_t byte = signs[r * bytes + at];
      for (int place = 0; place < 8; ++place) {
        uint32_t value;
        std::memcpy(&value, x + 8 * at + place, 4);
        value ^= (byte >> place & 1u) << 31;
        float flipped;
        std::memcpy(&flipped, &value, 4);
        total[place] += flipped;
      }
    }
    found[r] = ((total[0] + total[1]) + (total[2] + total[3])) +
               ((total[4] + total[5]) + (total[6] + total[7]));
  }
}

#endif

}  // namespace

// x (rows, width), signs (outputs, ceil(width / 8)), y (rows, outputs). The scales of a row of x
// begin `before_stride` and `after_stride` numbers after those of the row before: 0, all share them.
extern "C" void archzoo_one_bit(const float* x, const uint8_t* signs, const float* before,
                                const float* after, float* y, int64_t rows, int64_t outputs,
                                int64_t width, int64_t before_stride, int64_t after_stride,
                                int64_t threads) {
  const int64_t bytes = (width + 7) / 8, padded = 8 * bytes + kPadding;
  std::unique_ptr<float[]> scaled(new float[rows * padded]), wholes(new float[rows]);
  for (int64_t row = 0; row < rows; ++row) {
    float* here = scaled.get() + row * padded;
    for (int64_t i = 0; i < width; ++i) here[i] = x[row * width + i] * before[row * before_stride + i];
    std::memset(here + width, 0, (padded - width) * sizeof(float));
    double whole[kLanes] = {};
    for (int64_t i = 0; i < 8 * bytes; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) whole[lane] += here[i + lane];
    }
    for (int lane = 1; lane < kLanes; ++lane) whole[0] += whole[lane];
    wholes[row] = static_cast<float>(whole[0]);
  }
  const int64_t tiles = (outputs + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows * outputs * width >= kSmall)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kRows, count = outputs - first < kRows ? outputs - first : kRows;
    const uint8_t* here = signs + first * bytes;
    for (int64_t row = 0; row < rows; ++row) {
      const float* inputs = scaled.get() + row * padded;
      float found[kRows];
      if (count == kRows) {
        sums<kRows>(inputs, wholes[row], here, bytes, found);
      } else {
        for (int64_t r = 0; r < count; ++r) sums<1>(inputs, wholes[row], here + r * bytes, bytes, found + r);
      }
      for (int64_t r = 0; r < count; ++r) {
        y[row * outputs + first + r] = found[r] * after[row * after_stride + first + r];
      }
    }
  }
}
