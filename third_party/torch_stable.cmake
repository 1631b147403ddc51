# torch as the stable ABI sees it: its headers, and libtorch by name. find_package(Torch) is not used: on a CUDA build of
# torch it insists on a CUDA toolkit and adds flags of its own.
execute_process(COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${TORCH_DIR}/include)
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)   # 2.10
target_link_directories(torch_stable INTERFACE ${TORCH_DIR}/lib)
# libtorch.so is the umbrella: on a CUDA build it brings libtorch_cuda, whose stream function stable.h names weakly.
target_link_libraries(torch_stable INTERFACE -Wl,--no-as-needed torch -Wl,--as-needed torch_cpu)
