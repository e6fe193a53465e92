# SPDX-FileCopyrightText: 2026 The BSFA developers
# SPDX-License-Identifier: BSD-3-Clause

# What becomes of the library once it is linked: its exports are checked, what ptxas said of its kernels is put
# beside it, and it is installed with header and package configuration, in the layout of the Python package.

include(CMakePackageConfigHelpers)

add_custom_command(TARGET bsfa POST_BUILD VERBATIM COMMENT "Checking the exports of libbsfa"
  COMMAND "${CMAKE_COMMAND}" "-DNM=${CMAKE_NM}" "-DLIBRARY=$<TARGET_FILE:bsfa>" -P "${BSFA_MODULES}/CheckSymbols.cmake")

install(TARGETS bsfa EXPORT bsfaTargets LIBRARY DESTINATION lib)
install(FILES include/bsfa/bsfa.h DESTINATION include/bsfa)

if(BSFA_HAS_CUDA)
  get_target_property(objects bsfa BSFA_OBJECTS)
  add_custom_command(TARGET bsfa POST_BUILD VERBATIM COMMENT "Collecting what ptxas said of the kernels"
    COMMAND "${CMAKE_COMMAND}" "-DOUTPUT=$<TARGET_FILE:bsfa>.ptxas" "-DNVCC_VERSION=${CMAKE_CUDA_COMPILER_VERSION}"
      "-DOBJECTS=$<JOIN:${objects},$<COMMA>>" -P "${BSFA_MODULES}/CollectResources.cmake")
  install(FILES "$<TARGET_FILE:bsfa>.ptxas" DESTINATION lib)
endif()

install(EXPORT bsfaTargets NAMESPACE bsfa:: DESTINATION lib/cmake/bsfa)
configure_package_config_file("${BSFA_MODULES}/bsfaConfig.cmake.in" bsfaConfig.cmake
  INSTALL_DESTINATION lib/cmake/bsfa)
write_basic_package_version_file(bsfaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/bsfaConfig.cmake" "${CMAKE_CURRENT_BINARY_DIR}/bsfaConfigVersion.cmake"
  DESTINATION lib/cmake/bsfa)
