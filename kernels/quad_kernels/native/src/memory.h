// Memory that a thread keeps for its next call. No class of the standard library: its functions would be compiled for
// this file's instruction set and could be linked into code for a smaller one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace {

constexpr int64_t kLine = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

// An array that starts on a cache line and only grows.
template <class T>
class Buffer {
  public:
    ~Buffer() { std::free(data_); }
    T* at_least(int64_t count) {
        if (count > capacity_) {
            std::free(data_);
            data_ = static_cast<T*>(std::aligned_alloc(kLine, round_up(count * sizeof(T), kLine)));
            capacity_ = data_ ? count : 0;
            if (!data_) throw std::bad_alloc();
        }
        return data_;
    }

  private:
    T* data_ = nullptr;
    int64_t capacity_ = 0;
};

}  // namespace
