//! The kernels on NVIDIA's GPUs: `label_smoothing.cu`, compiled by NVRTC for the device at hand when a
//! kind of input is first met, and kept.

pub(crate) use super::gpu::{add_range, backward, backward_in_place, finish, forward, smooth};

use super::gpu::{Buffer, Gpu, Kernel, Kind, Limits};
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, Result, Storage};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

const SOURCE: &str = include_str!("label_smoothing.cu");

/// The slice of whatever type in a storage.
macro_rules! of_slice {
    ($storage:expr, $slice:ident => $value:expr) => {
        match $storage {
            CudaStorageSlice::U8($slice) => $value,
            CudaStorageSlice::U32($slice) => $value,
            CudaStorageSlice::I16($slice) => $value,
            CudaStorageSlice::I32($slice) => $value,
            CudaStorageSlice::I64($slice) => $value,
            CudaStorageSlice::BF16($slice) => $value,
            CudaStorageSlice::F16($slice) => $value,
            CudaStorageSlice::F32($slice) => $value,
            CudaStorageSlice::F64($slice) => $value,
            CudaStorageSlice::F8E4M3($slice) => $value,
            CudaStorageSlice::F6E2M3($slice)
            | CudaStorageSlice::F6E3M2($slice)
            | CudaStorageSlice::F4($slice)
            | CudaStorageSlice::F8E8M0($slice) => $value,
        }
    };
}

impl Gpu for CudaStorage {
    /// The same on every device.
    fn limits(_: &CudaDevice, _: Kernel) -> Result<Limits> {
        Ok(Limits { groups: i32::MAX as usize, threads: 1024, warp: 32 })
    }

    fn len(&self) -> usize {
        of_slice!(&self.slice, slice => slice.len())
    }

    fn of(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        }
    }

    unsafe fn launch<P: Copy>(
        device: &CudaDevice,
        kernel: Kernel,
        (groups, threads): (usize, usize),
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> Result<()> {
        let Compiled { name, ptx } = &*compiled(device, kernel.kind)?;
        let function = device.get_or_load_custom_func(kernel.name, name, ptx)?;
        let mut launch = function.builder();
        for buffer in buffers {
            match buffer {
                Buffer::In(storage) => of_slice!(&storage.slice, slice => launch.arg(slice)),
                Buffer::Out(storage) => of_slice!(&mut storage.slice, slice => launch.arg(slice)),
                Buffer::Unused => launch.arg(&NULL),
            };
        }
        let params = Bytes(*params);
        launch.arg(&params);
        let size = LaunchConfig {
            grid_dim: (groups as u32, 1, 1),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: the caller vouches for the arguments.
        unsafe { launch.launch(size) }.w()?;
        Ok(())
    }
}

/// What a pointer is that the kernel does not follow.
const NULL: u64 = 0;

/// Numbers that a kernel takes by value.
#[repr(transparent)]
struct Bytes<P>(P);

// SAFETY: the driver copies as many bytes as the kernel's own parameter has, and whoever launches it
// vouches that it is the same struct.
unsafe impl<P: Copy> DeviceRepr for Bytes<P> {}

/// The source, compiled.
struct Compiled {
    /// In candle's list of a device's modules.
    name: String,
    ptx: String,
}

/// The source compiled for a device's architecture and a kind of input. Devices of several architectures
/// may be in use, each with code of its own.
fn compiled(device: &CudaDevice, kind: Kind) -> Result<Arc<Compiled>> {
    type Key = ((i32, i32), Kind);
    static COMPILED: LazyLock<Mutex<HashMap<Key, Arc<Compiled>>>> = LazyLock::new(Mutex::default);

    let capability = device.cuda_stream().context().compute_capability().w()?;
    let mut all = COMPILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(compiled) = all.get(&(capability, kind)) {
        return Ok(compiled.clone());
    }
    let (major, minor) = capability;
    let options = CompileOptions {
        name: Some("label_smoothing.cu".to_string()),
        options: vec![
            format!("--gpu-architecture=compute_{major}{minor}"),
            "--std=c++17".to_string(),
        ],
        ..CompileOptions::default()
    };
    let definitions = kind.definitions()?;
    let ptx = compile_ptx_with_opts(format!("{definitions}{SOURCE}"), options).w()?.to_src();
    let name = format!("label-smoothing {definitions}");
    let compiled = Arc::new(Compiled { name, ptx });
    all.insert((capability, kind), compiled.clone());
    Ok(compiled)
}
