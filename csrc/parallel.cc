#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace simvlm {
namespace {

struct Job {
  void (*task)(void*, int64_t) = nullptr;
  void* context = nullptr;
  int64_t count = 0;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(context, i);
  }
};

thread_local bool inside_task = false;
thread_local bool own_pool_only = false;

// Workers live as long as the process (or until it forks: the child makes a pool of its own and leaves this one alone).
class Pool {
 public:
  explicit Pool(pid_t owner) : owner(owner) {}

  const pid_t owner;

  bool try_run(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
    std::unique_lock<std::mutex> only(entry_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    grow(threads - 1);
    Job job;
    job.task = task;
    job.context = context;
    job.count = count;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    inside_task = true;
    job.work();
    inside_task = false;
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a worker that has not woken yet need not: no index is left
    while (active_ != 0) wait(done_);
    job_ = nullptr;
    return true;
  }

 private:
  // As many workers as that, or as the system allows.
  void grow(int workers) {
    try {
      for (int have = static_cast<int>(workers_.size()); have < workers; ++have) {
        workers_.emplace_back([this] { serve(); });
      }
    } catch (const std::exception&) {
    }
  }

  void serve() {
    inside_task = true;
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      while (generation_ == seen) wait(wake_);
      seen = generation_;
      if (wanted_ == 0) continue;
      --wanted_;
      ++active_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  // With mutex_ held. std::condition_variable::wait would bind gcc 12's wheels to GLIBCXX_3.4.30, and so to
  // manylinux_2_35.
  void wait(std::condition_variable& event) { pthread_cond_wait(event.native_handle(), mutex_.native_handle()); }

  std::mutex entry_;  // one job at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, active_ = 0;
  uint64_t generation_ = 0;
};

std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  Pool* pool = current_pool.load();
  const pid_t here = getpid();
  while (pool == nullptr || pool->owner != here) {
    Pool* fresh = new Pool(here);
    if (current_pool.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
  }
  return *pool;
}

// libgomp's entry for `#pragma omp parallel`, which LLVM's and Intel's libraries offer too: fn(data) on each thread.
using Parallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

struct Loaded {
  std::string torch_folder;
  std::vector<std::string> openmp;
};

int note_library(dl_phdr_info* info, size_t, void* loaded_) {
  Loaded& loaded = *static_cast<Loaded*>(loaded_);
  const std::string path = info->dlpi_name;
  const size_t slash = path.rfind('/') + 1;  // 0 where there is none
  const char* name = path.c_str() + slash;
  if (std::strncmp(name, "libtorch_cpu.", 13) == 0) loaded.torch_folder = path.substr(0, slash);
  for (const char* known : {"libgomp", "libomp", "libiomp5"}) {
    if (std::strncmp(name, known, std::strlen(known)) == 0) loaded.openmp.push_back(path);
  }
  return 0;
}

// Of the OpenMP library that torch uses; null where there is no torch or none such.
Parallel find_torch_parallel() {
  Loaded loaded;
  dl_iterate_phdr(note_library, &loaded);
  if (loaded.torch_folder.empty() || loaded.openmp.empty()) return nullptr;
  std::string chosen = loaded.openmp.front();
  for (const std::string& path : loaded.openmp) {  // other packages may bring a copy; torch's lies beside it
    if (path.rfind(loaded.torch_folder, 0) == 0) chosen = path;
  }
  void* library = dlopen(chosen.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr : reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
}

std::atomic<bool> is_forked{false};
// When the module loads, not at the first call: torch's threads may be there before, and a fork before that call.
const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

Parallel torch_parallel() {
  static std::atomic<Parallel> found{nullptr};
  if (is_forked || registered != 0) return nullptr;  // OpenMP's threads did not survive, and it does not know
  Parallel parallel = found.load(std::memory_order_relaxed);
  if (parallel == nullptr) {  // torch may be imported later: look again
    parallel = find_torch_parallel();
    found.store(parallel, std::memory_order_relaxed);
  }
  return parallel;
}

bool try_torch_threads(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
  const Parallel parallel = torch_parallel();
  if (parallel == nullptr) return false;
  Job job;
  job.task = task;
  job.context = context;
  job.count = count;
  auto work = [](void* job) {
    inside_task = true;
    static_cast<Job*>(job)->work();
    inside_task = false;
  };
  parallel(work, &job, static_cast<unsigned>(threads), 0);
  return true;
}

struct Scratch {
  float* data = nullptr;
  int64_t floats = 0;
  ~Scratch() { std::free(data); }

  float* at_least(int64_t wanted) {
    if (wanted < 1) wanted = 1;  // null means that there is no memory
#ifdef SIMVLM_SANITIZE
    floats = 0;  // a block of its own for every call, of just the size asked for: overruns and old pointers are seen
#endif
    if (floats < wanted) {
      std::free(data);
      void* block = nullptr;
      const bool failed = posix_memalign(&block, 64, static_cast<size_t>(wanted) * sizeof(float)) != 0;
      data = failed ? nullptr : static_cast<float*>(block);
      floats = failed ? 0 : wanted;
    }
#ifdef SIMVLM_SANITIZE
    for (int64_t i = 0; i < floats; ++i) data[i] = std::numeric_limits<float>::quiet_NaN();
#endif
    return data;
  }
};
thread_local Scratch scratch, shared;

}  // namespace

void parallel_for(int64_t count, int threads, void (*task)(void*, int64_t), void* context) {
  if (threads > count) threads = static_cast<int>(count);
  if (threads > 1 && !inside_task) {
    if (!own_pool_only && try_torch_threads(count, threads, task, context)) return;
    if (pool().try_run(count, threads, task, context)) return;
  }
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

OwnPool::OwnPool() : before_(own_pool_only) { own_pool_only = true; }

OwnPool::~OwnPool() { own_pool_only = before_; }

float* thread_scratch(int64_t floats) { return scratch.at_least(floats); }

float* shared_scratch(int64_t floats) { return shared.at_least(floats); }

}  // namespace simvlm
