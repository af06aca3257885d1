#include "choose.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

namespace quad {
namespace {

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers leaf(unsigned number, unsigned part) {
    Registers r;
    __get_cpuid_count(number, part, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

bool has(unsigned word, std::initializer_list<int> bits) {
    for (int bit : bits)
        if (!(word >> bit & 1)) return false;
    return true;
}

uint64_t enabled_state() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

// Linux gives the tile registers to a process that asks.
bool may_use_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

std::vector<const Kernels*> find() {
    std::vector<const Kernels*> found;
    Registers one = leaf(1, 0), seven = leaf(7, 0), more = leaf(7, 1);
    if (!has(one.ecx, {12, 27, 29})) return found;  // FMA, XGETBV, F16C
    uint64_t state = enabled_state();
    bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xE6) == 0xE6, tiles = (state & 0x60000) == 0x60000;
    bool avx2 = ymm && has(seven.ebx, {5});
    bool avx512 = avx2 && zmm && has(seven.ebx, {16, 17, 30, 31}) && has(seven.ecx, {11});  // F, DQ, BW, VL; VNNI
    if (avx512 && tiles && has(seven.edx, {22, 24, 25}) && may_use_tiles()) found.push_back(amx_kernels());
    if (avx512) found.push_back(avx512vnni_kernels());
    if (avx2 && has(more.eax, {4})) found.push_back(avxvnni_kernels());
    if (avx2) found.push_back(avx2_kernels());
    return found;
}

const std::vector<const Kernels*>& available() {
    static const std::vector<const Kernels*> found = find();
    return found;
}

std::atomic<const Kernels*> forced{nullptr};

}  // namespace

const Kernels* chosen() {
    const Kernels* kernels = forced.load(std::memory_order_relaxed);
    if (kernels) return kernels;
    return available().empty() ? nullptr : available().front();
}

bool choose(const char* name) {
    for (const Kernels* kernels : available())
        if (std::strcmp(kernels->name, name) == 0) {
            forced.store(kernels);
            return true;
        }
    return false;
}

const char* supported() {
    static const std::string names = [] {
        std::string text;
        for (const Kernels* kernels : available()) text += (text.empty() ? "" : " ") + std::string(kernels->name);
        return text;
    }();
    return names.c_str();
}

}  // namespace quad
