// What registry.cpp's two lists hold, for _C and _simt to tell Python.
#pragma once
#include <string>
#include <vector>

namespace pyseq {

std::vector<std::string> cpu_ops();
std::vector<std::string> cuda_ops();   // compiled by nvcc; in the emulator's module, those that it runs

}  // namespace pyseq
