// Prints GFLOP/s of fused multiply-adds on registers alone, on each number of threads given: what no kernel can exceed.
// Built by benchmarks/machine.py with -march=native.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float vfloat __attribute__((vector_size(lanes * 4)));

// More sums than any processor's units times their latency, few enough for its registers.
constexpr int chains = lanes == 16 ? 16 : 12;
constexpr long rounds = 4000000;

static void spin() {
  vfloat sum[chains] = {}, x = vfloat{} + 1e-3f, y = vfloat{} + 1e-3f;
  for (long k = 0; k < rounds; ++k) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) {
      sum[i] += x * y;
      asm volatile("" : "+v"(sum[i]));
    }
  }
}

int main(int count, char** threads) {
  for (int i = 1; i < count; ++i) {
    double best = 0;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const int n = std::atoi(threads[i]);
      const auto start = std::chrono::steady_clock::now();
      std::vector<std::thread> others;
      for (int t = 1; t < n; ++t) others.emplace_back(spin);
      spin();
      for (std::thread& other : others) other.join();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      const double gflops = 2e-9 * chains * lanes * rounds * n / took.count();
      best = gflops > best ? gflops : best;
    }
    std::printf("%.1f\n", best);
  }
}
