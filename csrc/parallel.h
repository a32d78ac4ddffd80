// Runs independent tasks on a thread pool that others may be using, from one of its own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>

namespace nt {

// Schedules a function on some other thread, at some time, possibly long after all tasks are done.
using Schedule = std::function<void(std::function<void()>)>;

class Parallel {
 public:
  // Without `schedule`, everything runs in the caller.
  Parallel(Schedule schedule, int64_t n_threads) : schedule_(std::move(schedule)), n_threads_(n_threads) {}

  // Calls `work(next)` on several threads. Each call takes tasks 0 <= i < n_tasks from `next()` until that returns -1.
  //
  // The caller works too, and afterwards waits only for helpers that have begun: one that is never started is never
  // waited for, so that calls which share a busy pool cannot block each other. Rethrows an exception of `work`, and one
  // of the schedule, when no helper is at work any more.
  template <typename Work>
  void run(int64_t n_tasks, const Work& work) const {
    if (n_tasks <= 0) return;
    auto state = std::make_shared<State>();
    state->n_tasks = n_tasks;
    state->work = [&work](const Next& next) { work(next); };
    const Closing closing{*state};
    const int64_t n_helpers = schedule_ ? std::min<int64_t>(n_threads_, n_tasks) - 1 : 0;
    for (int64_t h = 0; h < n_helpers; ++h) {
      schedule_([state] { state->help(); });
    }
    std::exception_ptr error = state->participate();
    state->close();
    if (!error) error = state->error;
    if (error) std::rethrow_exception(error);
  }

 private:
  using Next = std::function<int64_t()>;

  struct State {
    int64_t n_tasks = 0;
    std::function<void(const Next&)> work;  // refers to the caller's frame: called before `closed` only
    std::atomic<int64_t> counter{0};
    std::mutex mutex;
    std::condition_variable idle;
    int active = 0;  // helpers at work
    bool closed = false;
    std::exception_ptr error;

    // From here on no helper begins, and none is at work.
    void close() {
      counter.store(n_tasks);
      std::unique_lock<std::mutex> lock(mutex);
      closed = true;
      idle.wait(lock, [this] { return active == 0; });
    }

    std::exception_ptr participate() {
      try {
        work([this] {
          const int64_t i = counter.fetch_add(1, std::memory_order_relaxed);
          return i < n_tasks ? i : int64_t{-1};
        });
      } catch (...) {
        counter.store(n_tasks);
        return std::current_exception();
      }
      return nullptr;
    }

    void help() {
      {
        std::lock_guard<std::mutex> lock(mutex);
        if (closed) return;
        ++active;
      }
      const std::exception_ptr caught = participate();
      std::lock_guard<std::mutex> lock(mutex);
      if (caught && !error) error = caught;
      --active;
      idle.notify_all();
    }
  };

  // Closes at the end of the caller's frame, by an exception of the schedule too.
  struct Closing {
    State& state;
    ~Closing() { state.close(); }
  };

  Schedule schedule_;
  int64_t n_threads_;
};

}  // namespace nt
