//! The kernels on Apple's GPUs: `label_smoothing.metal`, compiled when a kind of input is first met, and
//! kept as one pipeline for each device and kernel.

pub(crate) use super::gpu::{add_range, backward, backward_in_place, finish, forward, smooth};

use super::gpu::{Buffer, Gpu, Kernel, Limits};
use candle_core::backend::BackendStorage;
use candle_core::{MetalDevice, MetalError, MetalStorage, Result, Storage};
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline};
use objc2_metal::{MTLCompileOptions, MTLComputePipelineState, MTLMathMode, MTLSize};
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
        // Through candle's two methods, which find out where one kernel has to wait for another.
        let mut index = 0;
        for buffer in buffers {
            match buffer {
                Buffer::In(storage) => encoder.set_input_buffer(index, Some(storage.buffer()), 0),
                Buffer::Out(storage) => encoder.set_output_buffer(index, Some(storage.buffer()), 0),
                Buffer::Unused => encoder.set_input_buffer(index, None, 0),
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
    // Fast math, which is what there is otherwise, knows no NaN and no infinity.
    let options = MTLCompileOptions::new();
    if objc2::available!(macos = 15, ios = 18) {
        options.setMathMode(MTLMathMode::Safe);
    } else {
        #[allow(deprecated, reason = "older systems have nothing else")]
        options.setFastMathEnabled(false);
    }
    let source = format!("{}{SOURCE}", kernel.kind.definitions()?);
    let library =
        metal.new_library_with_source(&source, Some(&options)).map_err(MetalError::from)?;
    let function = library.get_function(kernel.name, None).map_err(MetalError::from)?;
    let pipeline =
        metal.new_compute_pipeline_state_with_function(&function).map_err(MetalError::from)?;
    all.insert(key, pipeline.clone());
    Ok(pipeline)
}
