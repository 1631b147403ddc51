# pybind11 as it is installed; where it is not, the copy of its headers that every torch brings along, so that a machine
# with torch and no network can build. Both give pybind11_add_module(name NO_EXTRAS source...).
find_package(pybind11 CONFIG QUIET)
if(NOT pybind11_FOUND AND NOT CMAKE_DISABLE_FIND_PACKAGE_pybind11)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
                  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  find_package(pybind11 CONFIG QUIET)
endif()
if(NOT pybind11_FOUND)
  if(NOT EXISTS ${TORCH_DIR}/include/pybind11/pybind11.h)
    message(FATAL_ERROR "pybind11 is not installed, and ${TORCH_DIR}/include holds no copy of it")
  endif()
  message(STATUS "pybind11 is not installed: using the headers in ${TORCH_DIR}/include")
  function(pybind11_add_module name)
    list(REMOVE_ITEM ARGN NO_EXTRAS)
    python_add_library(${name} MODULE WITH_SOABI ${ARGN})
    target_include_directories(${name} SYSTEM PRIVATE ${TORCH_DIR}/include)
  endfunction()
endif()
