#include "pyprune/pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace pyprune {
namespace {

struct Job {
  PoolTask task;
  void* context;
  std::ptrdiff_t items;
  std::atomic<std::ptrdiff_t> next{0};
  int helpers = 0;  // workers inside run(); guarded by the pool's mutex
  std::condition_variable idle{};

  void run() {
    for (std::ptrdiff_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) task(context, i);
  }

  bool run(PoolPoll poll, void* poll_context) {
    for (std::ptrdiff_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      task(context, i);
      if (poll && poll(poll_context)) {
        next.store(items, std::memory_order_relaxed);
        return false;
      }
    }
    return true;
  }
};

class Pool {
 public:
  bool run(Job& job, int threads, PoolPoll poll, void* poll_context) {
    const int helpers = static_cast<int>(std::min<std::ptrdiff_t>(threads - 1, job.items - 1));
    {
      std::lock_guard lock(mutex_);
      grow(helpers);
      tickets_.insert(tickets_.end(), static_cast<std::size_t>(std::min(helpers, workers_)), &job);
    }
    wake_.notify_all();
    const bool finished = job.run(poll, poll_context);
    std::unique_lock lock(mutex_);
    // Nothing is left to claim: tickets that no worker took would only point at a dead job.
    tickets_.erase(std::remove(tickets_.begin(), tickets_.end(), &job), tickets_.end());
    job.idle.wait(lock, [&] { return job.helpers == 0; });
    return finished;
  }

 private:
  // Workers inherit a mask that blocks every signal, so Ctrl-C always reaches the interpreter's own thread.
  void grow(int wanted) {
    if (workers_ >= wanted) return;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {
      // Out of threads: the caller still does all the work that nobody else takes.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return !tickets_.empty(); });
      Job* job = tickets_.front();
      tickets_.pop_front();
      ++job->helpers;
      lock.unlock();
      job->run();
      lock.lock();
      if (--job->helpers == 0) job->idle.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job*> tickets_;
  int workers_ = 0;
};

std::mutex& creation() {
  alignas(std::mutex) static unsigned char storage[sizeof(std::mutex)];
  static std::mutex* mutex = new (storage) std::mutex;
  return *mutex;
}

Pool* current = nullptr;

// Only the forking thread lives on in a child. The old pool's locks may be held by threads that no longer exist, so it
// is abandoned, not destroyed, and the next call starts a new one.
void forget_pool() {
  current = nullptr;
  new (&creation()) std::mutex;
}

Pool& pool() {
  std::lock_guard lock(creation());
  if (!current) {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    static_cast<void>(registered);
    current = new Pool;  // never deleted: sleeping workers must not keep the process from ending
  }
  return *current;
}

}  // namespace

bool parallel_for(std::ptrdiff_t items, int threads, PoolTask task, void* context, PoolPoll poll, void* poll_context) {
  Job job{task, context, items};
  return threads <= 1 || items <= 1 ? job.run(poll, poll_context) : pool().run(job, threads, poll, poll_context);
}

}  // namespace pyprune
