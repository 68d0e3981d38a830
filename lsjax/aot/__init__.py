"""What programs for TPUs cost, from compiling them on a machine without one."""
