//! Asynchronous launches and tensors of more than 2³¹ elements, on a real CUDA device.

#[path = "../common/mod.rs"]
mod common;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::cudarc::nvrtc::compile_ptx;
use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{device, random, random_labels, values};

/// Kernel that keeps the device busy for `nanoseconds`.
const BUSY: &str = r#"
    extern "C" __global__ void busy(unsigned long long nanoseconds) {
        unsigned long long from, now;
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(from));
        do {
            asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        } while (now - from < nanoseconds);
    }"#;

/// Forward and backward return while the device still runs an earlier kernel.
#[test]
fn forward_and_backward_do_not_wait_for_the_device() -> Result<()> {
    let weights = Tensor::new(&[1f32, 2., 3.], device())?;
    let logits =
        Var::from_tensor(&random(&[100, 3], 2., 1)?.to_dtype(DType::F32)?.to_device(device())?)?;
    let labels = random_labels(&[100], 3, 2)?.to_device(device())?;
    let one = Tensor::new(1f32, device())?;
    for reduction in [Reduction::Mean, Reduction::Sum, Reduction::None] {
        let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?)
            .with_class_weights(&weights)?
            .with_ignore_index(0)
            .with_reduction(reduction);
        let step = || -> Result<Tensor> {
            let loss = loss.forward(&logits, &labels)?.broadcast_mul(&one)?;
            let gradients = loss.backward()?;
            Ok(gradients.get(&logits).expect("no gradient").clone())
        };
        // The first step compiles the kernels and copies the class weights to the device.
        let expected = values(&step()?)?;

        let cuda = device().as_cuda_device()?;
        let busy =
            cuda.get_or_load_custom_func("busy", "busy", &compile_ptx(BUSY).w()?.to_src())?;
        let mut launch = busy.builder();
        launch.arg(&2_000_000_000u64);
        let size = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (1, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel takes one number and touches no memory.
        unsafe { launch.launch(size) }.w()?;
        let done = cuda.cuda_stream().record_event(None).w()?;
        let gradient = step()?;
        assert!(!done.is_complete(), "{reduction:?}: forward or backward waited");
        assert_eq!(values(&gradient)?, expected, "{reduction:?}");
        assert!(done.is_complete());
    }
    Ok(())
}

/// The gradient has more than 2³¹ elements. Its last row equals the gradient of that row alone.
#[test]
fn more_than_2_to_the_31_elements() -> Result<()> {
    let (num_rows, num_classes) = (70_000, 32_000);
    let row = random(&[1, num_classes], 3., 1)?.to_dtype(DType::BF16)?.to_device(device())?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::Sum);
    let gradient = |num_rows: usize| -> Result<Tensor> {
        let logits = Var::from_tensor(&row.broadcast_as((num_rows, num_classes))?.contiguous()?)?;
        let labels = Tensor::full(31_999u32, num_rows, device())?;
        let gradients = loss.forward(&logits, &labels)?.backward()?;
        let gradient = gradients.get(&logits).expect("no gradient");
        gradient.narrow(0, num_rows - 1, 1)?.contiguous()
    };
    match gradient(num_rows) {
        Ok(last) => assert_eq!(values(&last)?, values(&gradient(1)?)?),
        Err(error) => println!("skipped, as there is too little memory: {error}"),
    }
    Ok(())
}
