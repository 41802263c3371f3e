//! The kernels on Apple's GPUs: `label_smoothing.metal`, compiled when a kind of input is first met, and
//! kept as one pipeline for each device and kernel.

pub(crate) use super::gpu::{add_range, backward, backward_in_place, finish, forward, smooth};

use super::gpu::{Buffer, Gpu, Kernel, Kind, Limits};
use candle_core::backend::BackendStorage;
use candle_core::{MetalDevice, MetalError, MetalStorage, Result, Storage};
use candle_metal_kernels::MetalKernelError;
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline, Library};
use objc2_metal::{
    MTLCompileOptions, MTLComputePipelineState, MTLMathFloatingPointFunctions, MTLMathMode, MTLSize,
};
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

const SOURCE: &str = include_str!("label_smoothing.metal");

impl Gpu for MetalStorage {
    fn limits(device: &MetalDevice, kernel: Kernel) -> Result<Limits> {
        let pipeline = pipeline(device, kernel)?;
        Ok(Limits {
            groups: u32::MAX as usize,
            threads: pipeline.max_total_threads_per_threadgroup(),
            warp: pipeline.as_ref().threadExecutionWidth(),
        })
    }

    fn len(&self) -> usize {
        self.buffer().length() / self.dtype().size_in_bytes().max(1)
    }

    fn of(storage: &Storage) -> Option<&Self> {
        match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        }
    }

    unsafe fn launch<P: Copy>(
        device: &MetalDevice,
        kernel: Kernel,
        (groups, threads): (usize, usize),
        buffers: &mut [Buffer<Self>],
        params: &P,
    ) -> Result<()> {
        let pipeline = pipeline(device, kernel)?;
        let guard = device.command_encoder()?;
        let encoder: &ComputeCommandEncoder = guard.as_ref();
        encoder.set_label(kernel.name);
        encoder.set_compute_pipeline_state(&pipeline);
        // In place of one that the kernel does not use: the validation of Metal's API wants them all.
        let any = buffers.iter().find_map(|buffer| match buffer {
            Buffer::In(storage) => Some(storage.buffer().clone()),
            Buffer::Out(_) | Buffer::Unused => None,
        });
        // Through candle's two methods, which find out where one kernel has to wait for another.
        let mut index = 0;
        for buffer in buffers {
            match buffer {
                Buffer::In(storage) => encoder.set_input_buffer(index, Some(storage.buffer()), 0),
                Buffer::Out(storage) => encoder.set_output_buffer(index, Some(storage.buffer()), 0),
                Buffer::Unused => encoder.set_input_buffer(index, any.as_ref(), 0),
            }
            index += 1;
        }
        encoder.set_bytes(index, params);
        let size = |width| MTLSize { width, height: 1, depth: 1 };
        encoder.dispatch_thread_groups(size(groups), size(threads));
        Ok(())
    }
}

/// The kernel compiled for a device and a kind of input.
fn pipeline(device: &MetalDevice, kernel: Kernel) -> Result<ComputePipeline> {
    type Key = (u64, Kernel);
    static PIPELINES: LazyLock<Mutex<HashMap<Key, ComputePipeline>>> =
        LazyLock::new(Mutex::default);

    let metal = device.metal_device();
    let key = (metal.registry_id(), kernel);
    let mut all = PIPELINES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pipeline) = all.get(&key) {
        return Ok(pipeline.clone());
    }
    let function = library(device, kernel.kind)?
        .get_function(kernel.name, None)
        .map_err(|error| failed(kernel.name, error))?;
    let pipeline = metal
        .new_compute_pipeline_state_with_function(&function)
        .map_err(|error| failed(kernel.name, error))?;
    all.insert(key, pipeline.clone());
    Ok(pipeline)
}

/// The source compiled for a device and a kind of input: all kernels at once.
fn library(device: &MetalDevice, kind: Kind) -> Result<Library> {
    type Key = (u64, Kind);
    static LIBRARIES: LazyLock<Mutex<HashMap<Key, Library>>> = LazyLock::new(Mutex::default);

    let metal = device.metal_device();
    let key = (metal.registry_id(), kind);
    let mut all = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(library) = all.get(&key) {
        return Ok(library.clone());
    }
    // Fast math, which is what there is otherwise, knows no NaN and no infinity. Two properties since macOS 15,
    // of which the second says how exact exp and log are.
    let options = MTLCompileOptions::new();
    if objc2::available!(macos = 15, ios = 18) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[allow(deprecated, reason = "older systems have nothing else")]
        options.setFastMathEnabled(false);
    }
    let source = format!("{}{SOURCE}", kind.definitions()?);
    let library = metal
        .new_library_with_source(&source, Some(&options))
        .map_err(|error| failed("label_smoothing.metal", error))?;
    all.insert(key, library.clone());
    Ok(library)
}

/// With what the compiler said, which candle's error does not show of a pipeline.
fn failed(what: &str, error: MetalKernelError) -> MetalError {
    MetalError::Message(match error {
        MetalKernelError::FailedToCreatePipeline(message) => format!("{what}: {message}"),
        error => format!("{what}: {error}"),
    })
}
