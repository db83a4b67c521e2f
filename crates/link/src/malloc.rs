//! How the process's heap treats the buffers of chunks.
//!
//! Each chunk that comes over a link lies in a buffer of its own, which is freed when its last user is done
//! with it, often by another thread. The GNU allocator gives the top of a heap back to the kernel as soon as
//! 128 KiB of it are free: two such buffers. So it would return and fetch again the memory of almost every
//! chunk, and the page faults would cost a third of a link's processor time.

#[cfg(target_env = "gnu")]
mod gnu {
    use std::ffi::c_int;

    /// `M_TRIM_THRESHOLD`: free bytes at the top of a heap above which they go back to the kernel.
    const TRIM_THRESHOLD: c_int = -1;
    /// `M_MMAP_THRESHOLD`: size in bytes from which an allocation is mapped by itself, and unmapped when freed.
    const MMAP_THRESHOLD: c_int = -3;
    /// `M_ARENA_MAX`: heaps of a process at most.
    const ARENA_MAX: c_int = -8;

    /// Bytes that a heap keeps: a link's outstanding chunks twice over, and several guests' longest reads.
    const KEPT_BYTES_MAX: c_int = 8 << 20;

    /// Larger buffers than this are few, and clearing their pages costs less than using them.
    const HEAP_BUFFER_BYTES_MAX: c_int = 2 << 20;

    /// Bounds what all heaps keep together to 32 MiB. The default of eight for each core is for programs that
    /// do little else than allocate.
    const HEAPS_MAX: c_int = 4;

    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
    }

    pub(super) fn configure() {
        for (parameter, value) in [
            (TRIM_THRESHOLD, KEPT_BYTES_MAX),
            (MMAP_THRESHOLD, HEAP_BUFFER_BYTES_MAX),
            (ARENA_MAX, HEAPS_MAX),
        ] {
            // SAFETY: mallopt(3) takes two integers and touches nothing but the allocator's own settings,
            // under its lock. A value that it refuses leaves the setting as it was.
            unsafe { mallopt(parameter, value) };
        }
    }
}

/// Lets the process's heap keep some megabytes of freed buffers for the next chunks. For a program to call
/// when it starts, before it has threads; with other allocators than the GNU one it does nothing.
pub fn configure() {
    #[cfg(target_env = "gnu")]
    gnu::configure();
}
