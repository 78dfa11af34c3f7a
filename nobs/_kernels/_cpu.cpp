// One read of a tensor on the CPU, folded into its line: what _stats.measure says in torch's words, in one pass.
//
// A line is eight float32: norm, absmax, nan, posinf, neginf, -zeros, elements, -first; two lines fold by their maximum.
// The fast pass adds up squares in float32, 2048 elements at a time and those sums in float64, and looks at the bits for the
// rest: without the sign, bits order as the numbers do, with infinity and then NaN on top. Where that says that a value is not
// finite, or that squares may have left the range of float32, the slow pass reads the tensor once more, in float64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int W = 16;           // numbers at a time: a register of AVX-512; the compiler makes two or four of it elsewhere
constexpr int64_t BLOCK = 2048; // a longer sum in float32 drifts where all elements are equal
constexpr int AHEAD = 2048;     // bytes to ask the memory for beforehand: what a training step has left is in no near cache
constexpr int64_t SHARE = 32768; // elements below which a thread is not worth waking
constexpr double TINY = 1e-30;  // squares that sum to less may have lost bits

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));

template <typename To, typename From> To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Of> Of load(const void* at) {
  Of values;
  std::memcpy(&values, at, sizeof values);
  return values;
}

// How a dtype becomes float: many at a time, and one. Of a half only the size counts in the fast pass.

struct Float32 {
  using Stored = float;
  static constexpr int32_t infinite = 0x7f800000;
  static Floats many(const Stored* x) { return load<Floats>(x); }
  static double one(Stored x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static constexpr int32_t infinite = 0x7f800000;
  static Floats many(const Stored* x) { return bits<Floats>(__builtin_convertvector(load<Halves>(x), Words) << 16); }
  static double one(Stored x) { return bits<float>(uint32_t(x) << 16); }
};

struct Float16 {
  using Stored = uint16_t;
  static constexpr int32_t infinite = 0x47800000; // of 65536, which infinity becomes
  static Floats many(const Stored* x) {
    Words h = (__builtin_convertvector(load<Halves>(x), Words) & 0x7fff) << 13;
    Floats normal = bits<Floats>(h + (112u << 23));
    Floats small = bits<Floats>(h + (113u << 23)) - 6.103515625e-05f; // below 2**-14 there is no leading one to be implied
    return h < (1u << 23) ? small : normal;
  }
  static double one(Stored x) {
    double size = (x & 0x7c00) == 0x7c00 ? ((x & 0x3ff) ? NAN : INFINITY)
                  : std::ldexp(double((x & 0x3ff) | ((x & 0x7c00) ? 0x400 : 0)), std::max((x >> 10) & 31, 1) - 25);
    return x & 0x8000 ? -size : size;
  }
};

struct Float64 {
  using Stored = double;
  static double one(Stored x) { return x; }
};

struct Read {
  double squares = 0;
  int32_t top = 0; // bits of the largest size
  int64_t zeros = 0;
};

inline void take(Floats x, Floats& squares, Ints& top, Ints& zeros) {
  Ints size = bits<Ints>(x) & 0x7fffffff;
  squares += x * x;
  top = size > top ? size : top;
  zeros -= size == 0; // true is -1
}

template <typename D> Read fast(const typename D::Stored* x, int64_t count) {
  Read read;
  Ints top0{}, top1{};
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    int64_t i = begin, stop = std::min(count, begin + BLOCK);
    Floats squares0{}, squares1{};
    Ints zeros0{}, zeros1{};
    for (; i + 2 * W <= stop; i += 2 * W) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + i) + AHEAD); // behind the end it does nothing
      __builtin_prefetch(reinterpret_cast<const char*>(x + i + W) + AHEAD);
      take(D::many(x + i), squares0, top0, zeros0);
      take(D::many(x + i + W), squares1, top1, zeros1);
    }
    for (; i < stop; i += W) { // the rest, filled up with zeros that do not count
      int64_t left = std::min<int64_t>(W, stop - i);
      typename D::Stored rest[W] = {};
      std::memcpy(rest, x + i, left * sizeof *x);
      take(D::many(rest), squares0, top0, zeros0);
      read.zeros -= W - left;
    }
    squares0 += squares1;
    zeros0 += zeros1;
    for (int j = 0; j < W; j++) {
      read.squares += squares0[j];
      read.zeros += zeros0[j];
    }
  }
  top0 = top0 > top1 ? top0 : top1;
  for (int j = 0; j < W; j++) read.top = std::max(read.top, int32_t(top0[j]));
  return read;
}

template <typename D> void slow(const typename D::Stored* x, int64_t count, double* m) {
  double squares = 0, absmax = 0;
  int64_t nan = 0, posinf = 0, neginf = 0, zeros = 0;
  for (int64_t i = 0; i < count; i++) {
    double v = D::one(x[i]);
    nan += v != v;
    posinf += v == INFINITY;
    neginf += v == -INFINITY;
    zeros += v == 0;
    double finite = std::fabs(v) < INFINITY ? v : 0;
    squares += finite * finite;
    absmax = std::max(absmax, std::fabs(finite));
  }
  m[0] = nan + posinf + neginf < count ? std::sqrt(squares) : NAN; // with no finite value there is no norm
  m[1] = absmax, m[2] = nan, m[3] = posinf, m[4] = neginf, m[5] = -double(zeros) / count;
}

template <typename D> void measure(const void* data, int64_t count, int threads, double* m) {
  auto x = static_cast<const typename D::Stored*>(data);
  Read all;
  threads = int(std::min<int64_t>(threads, count / SHARE));
  if (threads > 1) {
    double squares = 0;
    int64_t zeros = 0, share = (count + threads - 1) / threads;
    int32_t top = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : squares, zeros) reduction(max : top)
    for (int t = 0; t < threads; t++) {
      int64_t begin = std::min(count, t * share);
      Read read = fast<D>(x + begin, std::min(share, count - begin));
      squares += read.squares, zeros += read.zeros, top = std::max(top, read.top);
    }
    all.squares = squares, all.zeros = zeros, all.top = top;
  } else {
    all = fast<D>(x, count);
  }
  if (all.top >= D::infinite || !(all.squares < INFINITY) || (all.top > 0 && all.squares < TINY)) return slow<D>(x, count, m);
  m[0] = std::sqrt(all.squares), m[1] = bits<float>(all.top), m[5] = -double(all.zeros) / count;
}

template <> void measure<Float64>(const void* data, int64_t count, int, double* m) {
  slow<Float64>(static_cast<const double*>(data), count, m);
}

// Two threads may run one model: neither may overwrite what the other has just folded in.
void raise(float* place, float to) {
  uint32_t before, after = bits<uint32_t>(to);
  auto word = reinterpret_cast<uint32_t*>(place);
  __atomic_load(word, &before, __ATOMIC_RELAXED);
  while (!(bits<float>(before) >= to) && bits<float>(before) == bits<float>(before)) // a NaN outlasts any fold
    if (__atomic_compare_exchange(word, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) break;
}

float tick(float* clock) {
  uint32_t before, after;
  auto word = reinterpret_cast<uint32_t*>(clock);
  __atomic_load(word, &before, __ATOMIC_RELAXED);
  do after = bits<uint32_t>(bits<float>(before) + 1);
  while (!__atomic_compare_exchange(word, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return bits<float>(after);
}

} // namespace

// dtype: as in DTYPES, and 0 for any other. clock: null where there is no place in the order; then `first` stands for it.
extern "C" void nobs_fold(const void* data, int64_t count, int32_t kind, float dtype, int32_t threads, float* line, float* clock,
                          float first) {
  static void (*const measures[])(const void*, int64_t, int, double*) = {measure<Float32>, measure<BFloat16>, measure<Float16>,
                                                                        measure<Float64>};
  double m[8] = {0, 0, 0, 0, 0, 0, double(count), 0};
  m[7] = -double(clock ? tick(clock) : first) - dtype / 16;
  if (count > 0) measures[kind](data, count, threads, m);
  for (int i = 0; i < 8; i++) raise(line + i, float(m[i]));
}

// The same for many tensors, one after the other: parameters, and their gradients. Six numbers each: where, how many elements, the
// line, what stands for its place in the order, kind + 8 * dtype, and whether the line is fresh: it forgets what it held.
extern "C" void nobs_fold_all(int32_t tensors, const int64_t* readings, int32_t threads, float* row) {
  static const float blank[8] = {0, 0, 0, 0, 0, -1, 0, -INFINITY};
  for (const int64_t* r = readings; r < readings + 6 * int64_t(tensors); r += 6) {
    float* line = row + 8 * r[2];
    if (r[5]) std::memcpy(line, blank, sizeof blank);
    nobs_fold(reinterpret_cast<const void*>(r[0]), r[1], int32_t(r[4] % 8), float(r[4] / 8), threads, line, nullptr, float(r[3]));
  }
}
