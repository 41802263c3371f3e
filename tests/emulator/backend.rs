//! Launches of the GPU kernels on an emulated device, whose memory is the host's.

use super::kernel::{Buffer, GpuStorage, Grid, KernelKey, Limits, SCRATCH_BYTES};
use candle_core::cpu_backend::CpuDevice;
use candle_core::{CpuStorage, DType, Result, Storage, bail};
use std::cell::{Cell, RefCell};
use std::env;
use std::ffi::{CString, c_char, c_uint, c_void};
use std::str::FromStr;
use std::sync::LazyLock;

/// How the device runs a launch. `device.hpp` has the same struct and documents its fields.
#[repr(C)]
#[derive(Clone, Copy)]
struct Manner {
    order: u32,
    without_line: u32,
    warp: u32,
    options: u32,
}

type Kernels = unsafe extern "C" fn(
    *const c_char,
    c_uint,
    c_uint,
    Manner,
    *const *mut c_void,
    *const c_void,
    usize,
) -> bool;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// A number from the environment.
fn setting<T: FromStr>(name: &str, default: T) -> T {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

static MANNER: LazyLock<Manner> = LazyLock::new(|| Manner {
    order: setting("EMULATOR_ORDER", 0),
    without_line: setting("EMULATOR_WITHOUT_LINE", 0),
    warp: setting("EMULATOR_WARP", 32),
    options: 0,
});
/// Whether the run is in the dialect of Metal instead of that of CUDA.
static IS_METAL: LazyLock<bool> =
    LazyLock::new(|| env::var("EMULATOR_SOURCE").as_deref() == Ok("metal"));
/// The largest number of blocks in a launch. It is so small that in most launches a block has several tasks.
static MAX_BLOCKS: LazyLock<usize> = LazyLock::new(|| setting("EMULATOR_GROUPS", 3));
/// The number of blocks at which a launch aims.
const TARGET_BLOCKS: usize = 512;

/// The numbers of launches and of allocations of this thread so far.
pub(crate) fn operations() -> (usize, usize) {
    (LAUNCHES.get(), ALLOCATIONS.get())
}

thread_local! {
    static LAUNCHES: Cell<usize> = const { Cell::new(0) };
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    /// The memory of [`Buffer::Scratch`].
    static SCRATCH: RefCell<Vec<u64>> = RefCell::new(vec![0; SCRATCH_BYTES / size_of::<u64>()]);
}

/// Evaluates an expression on the vector in a storage, whatever its type.
macro_rules! with_vec {
    ($storage:expr, $vec:ident => $value:expr) => {
        match $storage {
            CpuStorage::U8($vec) => $value,
            CpuStorage::U32($vec) => $value,
            CpuStorage::I16($vec) => $value,
            CpuStorage::I32($vec) => $value,
            CpuStorage::I64($vec) => $value,
            CpuStorage::BF16($vec) => $value,
            CpuStorage::F16($vec) => $value,
            CpuStorage::F32($vec) => $value,
            CpuStorage::F64($vec) => $value,
            CpuStorage::F8E4M3($vec) => $value,
            CpuStorage::F6E2M3($vec)
            | CpuStorage::F6E3M2($vec)
            | CpuStorage::F4($vec)
            | CpuStorage::F8E8M0($vec) => $value,
        }
    };
}

impl GpuStorage for CpuStorage {
    fn limits(_: &CpuDevice, _: KernelKey) -> Result<Limits> {
        Ok(Limits {
            max_blocks: *MAX_BLOCKS,
            target_blocks: TARGET_BLOCKS,
            max_threads: setting("EMULATOR_THREADS", 1024),
            warp_size: MANNER.warp as usize,
            joins_blocks: !*IS_METAL,
        })
    }

    fn len(&self) -> usize {
        with_vec!(self, vec => vec.len())
    }

    fn from_storage(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    /// The elements are NaN, or no class, so that tests find those that no kernel writes.
    fn alloc(_: &CpuDevice, len: usize, dtype: DType) -> Result<Self> {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        let nan = half::f16::NAN;
        Ok(match dtype {
            DType::F16 => CpuStorage::F16(vec![nan; len]),
            DType::BF16 => CpuStorage::BF16(vec![half::bf16::NAN; len]),
            DType::F32 => CpuStorage::F32(vec![f32::NAN; len]),
            DType::F64 => CpuStorage::F64(vec![f64::NAN; len]),
            DType::U32 => CpuStorage::U32(vec![u32::MAX; len]),
            dtype => bail!("no kernel writes {dtype:?}"),
        })
    }

    unsafe fn launch<P: Copy>(
        _: &CpuDevice,
        kernel: KernelKey,
        grid: Grid,
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> Result<()> {
        LAUNCHES.set(LAUNCHES.get() + 1);
        let definitions = kernel.variant.input_definitions()?;
        let all: &[(&str, Kernels)] = if *IS_METAL { &METAL } else { &CUDA };
        let Some((_, kernels)) = all.iter().find(|(variant, _)| *variant == definitions) else {
            bail!("the emulator has no kernels for {:?}", kernel.variant)
        };
        let pointers: Vec<*mut c_void> = buffers
            .iter_mut()
            .map(|buffer| match buffer {
                Buffer::Input(storage) => {
                    with_vec!(*storage, vec => vec.as_ptr().cast_mut().cast())
                }
                Buffer::Output(storage) => with_vec!(*storage, vec => vec.as_mut_ptr().cast()),
                Buffer::Scratch => SCRATCH.with_borrow_mut(|scratch| scratch.as_mut_ptr().cast()),
                Buffer::Unused => std::ptr::null_mut(),
            })
            .collect();
        let name = CString::new(kernel.name).map_err(candle_core::Error::wrap)?;
        let params = std::ptr::from_ref(params).cast();
        let manner = Manner { options: kernel.variant.options.0, ..*MANNER };
        // SAFETY: the caller vouches for the arguments. The function compares the size of the parameters with
        // that of the kernel's struct.
        let found = unsafe {
            kernels(
                name.as_ptr(),
                grid.blocks as c_uint,
                grid.threads_per_block as c_uint,
                manner,
                pointers.as_ptr(),
                params,
                size_of::<P>(),
            )
        };
        match found {
            true => Ok(()),
            false => bail!("no kernel {} with parameters of {} bytes", kernel.name, size_of::<P>()),
        }
    }
}
