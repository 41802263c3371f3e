//! The kernels of the GPU backends on tensors in the host's memory, on an emulated device.

pub(crate) use super::gpu::{add_range, backward, backward_in_place, finish, forward, smooth};
pub(crate) use super::result_dtype as parts_dtype;

use super::gpu::{Buffer, Gpu, Kernel, Limits};
use candle_core::cpu_backend::CpuDevice;
use candle_core::{CpuStorage, DType, Result, Storage, bail};
use std::env;
use std::ffi::{CString, c_char, c_uint, c_void};
use std::str::FromStr;
use std::sync::LazyLock;

/// A GPU cannot say that a target is no class.
pub(crate) fn check_labels(
    _: super::Operand<CpuStorage>,
    _: usize,
    _: Option<i64>,
) -> crate::error::Result<()> {
    Ok(())
}

/// How the device works; `device.hpp` says what it means.
#[repr(C)]
#[derive(Clone, Copy)]
struct Manner {
    order: u32,
    without_barrier: u32,
    warp: u32,
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
fn setting<T: FromStr>(name: &str, otherwise: T) -> T {
    env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
}

static MANNER: LazyLock<Manner> = LazyLock::new(|| Manner {
    order: setting("EMULATOR_ORDER", 0),
    without_barrier: setting("EMULATOR_WITHOUT_BARRIER", 0),
    warp: setting("EMULATOR_WARP", 32),
});
/// In which language.
static KERNELS: LazyLock<&[(&str, Kernels)]> =
    LazyLock::new(|| match env::var("EMULATOR_SOURCE").as_deref() {
        Ok("metal") => &METAL,
        _ => &CUDA,
    });
/// So few that most launches have more tasks than groups.
static GROUPS: LazyLock<usize> = LazyLock::new(|| setting("EMULATOR_GROUPS", 3));

/// The vector of whatever type in a storage.
macro_rules! of_vec {
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

impl Gpu for CpuStorage {
    fn limits(_: &CpuDevice, _: Kernel) -> Result<Limits> {
        Ok(Limits {
            groups: *GROUPS,
            threads: setting("EMULATOR_THREADS", 1024),
            warp: MANNER.warp as usize,
        })
    }

    fn len(&self) -> usize {
        of_vec!(self, vec => vec.len())
    }

    fn of(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        }
    }

    /// What nobody writes is NaN.
    fn alloc(_: &CpuDevice, len: usize, dtype: DType) -> Result<Self> {
        let nan = half::f16::NAN;
        Ok(match dtype {
            DType::F16 => CpuStorage::F16(vec![nan; len]),
            DType::BF16 => CpuStorage::BF16(vec![half::bf16::NAN; len]),
            DType::F32 => CpuStorage::F32(vec![f32::NAN; len]),
            DType::F64 => CpuStorage::F64(vec![f64::NAN; len]),
            dtype => bail!("no kernel writes {dtype:?}"),
        })
    }

    unsafe fn launch<P: Copy>(
        _: &CpuDevice,
        kernel: Kernel,
        (groups, threads): (usize, usize),
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> Result<()> {
        let definitions = kernel.kind.definitions()?;
        let Some((_, kernels)) = KERNELS.iter().find(|(of, _)| *of == definitions) else {
            bail!("the emulator has no kernels for {:?}", kernel.kind)
        };
        let pointers: Vec<*mut c_void> = buffers
            .iter_mut()
            .map(|buffer| match buffer {
                Buffer::In(storage) => of_vec!(*storage, vec => vec.as_ptr().cast_mut().cast()),
                Buffer::Out(storage) => of_vec!(*storage, vec => vec.as_mut_ptr().cast()),
                Buffer::Unused => std::ptr::null_mut(),
            })
            .collect();
        let name = CString::new(kernel.name).map_err(candle_core::Error::wrap)?;
        let params = std::ptr::from_ref(params).cast();
        let (groups, threads) = (groups as c_uint, threads as c_uint);
        // SAFETY: the caller vouches for the arguments; the kernels check the parameters' size.
        let found = unsafe {
            kernels(
                name.as_ptr(),
                groups,
                threads,
                *MANNER,
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
