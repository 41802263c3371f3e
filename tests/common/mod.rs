//! Inputs, comparisons and device selection shared by the test files.
#![allow(dead_code, reason = "each test file uses its own part")]

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Metrics, Reduction, Smoothing, smooth_targets};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;

pub mod compare;
pub mod processes;
pub mod program;

pub const CPU: Device = Device::Cpu;

/// Path of an example's program. Cargo builds the examples before it runs the integration tests, in the folder beside `deps`.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test has a path");
    let profile = test.ancestors().nth(2).expect("target/<profile>/deps/test");
    profile.join("examples").join(format!("{name}{}", std::env::consts::EXE_SUFFIX))
}

/// True in the test `gpu`, which runs the other tests' code on a GPU.
fn is_gpu_test() -> bool {
    option_env!("CARGO_CRATE_NAME") == Some("gpu")
}

/// Device under test: a GPU in the test `gpu`, the CPU elsewhere. The test `gpu` exits here without
/// a GPU, and fails if the environment has `REQUIRE_GPU`.
pub fn device() -> &'static Device {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| {
        let device = match is_gpu_test() {
            false => Ok(CPU),
            true if cfg!(feature = "metal") => Device::new_metal(0),
            true => Device::new_cuda(0),
        };
        device.unwrap_or_else(|error| {
            // The test harness captures `println!` of passing tests, so this line goes to stderr directly.
            let required = std::env::var_os("REQUIRE_GPU").is_some();
            let outcome = if required { "failed" } else { "skipped" };
            let _ = writeln!(std::io::stderr(), "{outcome}, as there is no GPU: {error}");
            std::process::exit(required.into())
        })
    });
    &DEVICE
}

/// Metal has no f64, so the test keeps f64 tensors on the CPU.
fn device_for(tensors: &[&Tensor]) -> &'static Device {
    match tensors.iter().any(|tensor| tensor.dtype() == DType::F64) && device().is_metal() {
        true => &CPU,
        false => device(),
    }
}

/// Logit dtypes that the device under test supports.
pub fn dtypes() -> Vec<DType> {
    let all = [DType::F64, DType::F32, DType::F16, DType::BF16];
    all.into_iter().filter(|dtype| !device().is_metal() || *dtype != DType::F64).collect()
}

/// Checks that two computations give the same bits on the CPU.
///
/// GPU kernels group the additions by memory layout. On a GPU the results may therefore differ by
/// some roundings of terms below ten, and half types by one more rounding of the result.
pub fn assert_same(name: &str, dtype: DType, actual: &[f64], expected: &[f64]) {
    let (roundings, ulp) = match dtype {
        _ if !is_gpu_test() && !cfg!(emulator) => (0., 0.),
        DType::F64 => (1e-14, 0.),
        DType::F16 => (4e-6, 2f64.powi(-10)),
        DType::BF16 => (4e-6, 2f64.powi(-7)),
        _ => (4e-6, 0.),
    };
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (actual, expected) in actual.iter().zip(expected) {
        let close = (actual - expected).abs() <= roundings + ulp * expected.abs();
        assert!(close || actual == expected, "{name}: {actual}, expected {expected}");
    }
}

/// Copies a tensor to the device under test.
pub fn on_device(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_device(device_for(&[tensor]))
}

/// Runs the loss on the device under test, with input and result on the CPU.
pub trait OnDevice {
    fn on_device(
        &self,
        logits: &Tensor,
        targets: &Tensor,
    ) -> candle_label_smoothing::Result<Tensor>;

    /// The same, with weights for the rows.
    fn weighted_on_device(
        &self,
        row_weights: &Tensor,
        logits: &Tensor,
        targets: &Tensor,
    ) -> candle_label_smoothing::Result<Tensor>;

    /// The loss and the metrics, with weights for the rows if there are any.
    fn metrics_on_device(
        &self,
        row_weights: Option<&Tensor>,
        logits: &Tensor,
        targets: &Tensor,
    ) -> candle_label_smoothing::Result<(Tensor, Metrics)>;
}

impl OnDevice for LabelSmoothingLoss {
    fn on_device(
        &self,
        logits: &Tensor,
        targets: &Tensor,
    ) -> candle_label_smoothing::Result<Tensor> {
        let device = device_for(&[logits, targets]);
        let (logits, targets) = (logits.to_device(device)?, targets.to_device(device)?);
        Ok(self.forward(&logits, &targets)?.to_device(&CPU)?)
    }

    fn weighted_on_device(
        &self,
        row_weights: &Tensor,
        logits: &Tensor,
        targets: &Tensor,
    ) -> candle_label_smoothing::Result<Tensor> {
        let device = device_for(&[row_weights, logits, targets]);
        let (logits, targets) = (logits.to_device(device)?, targets.to_device(device)?);
        let loss = self.weigh_rows(&row_weights.to_device(device)?)?;
        Ok(loss.forward(&logits, &targets)?.to_device(&CPU)?)
    }

    fn metrics_on_device(
        &self,
        row_weights: Option<&Tensor>,
        logits: &Tensor,
        targets: &Tensor,
    ) -> candle_label_smoothing::Result<(Tensor, Metrics)> {
        let inputs: Vec<&Tensor> = row_weights.into_iter().chain([logits, targets]).collect();
        let device = device_for(&inputs);
        let loss = match row_weights {
            Some(weights) => self.weigh_rows(&weights.to_device(device)?)?,
            None => self.clone(),
        };
        let (logits, targets) = (logits.to_device(device)?, targets.to_device(device)?);
        let (loss, metrics) = loss.forward_with_metrics(&logits, &targets)?;
        Ok((loss.to_device(&CPU)?, metrics))
    }
}

/// Runs `smooth_targets` on the device under test, with input and result on the CPU.
pub fn smooth_on_device(
    labels: &Tensor,
    num_classes: usize,
    smoothing: &Smoothing,
) -> candle_label_smoothing::Result<Tensor> {
    let labels = labels.to_device(device_for(&[labels]))?;
    Ok(smooth_targets(&labels, num_classes, smoothing)?.to_device(&CPU)?)
}

/// Uniform numbers from −`range` to `range`, f64.
pub fn random(dims: &[usize], range: f64, seed: u64) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> =
        (0..dims.iter().product()).map(|_| rng.random_range(-range..=range)).collect();
    Tensor::from_vec(values, dims, &CPU)
}

/// Uniform class indices, i64.
pub fn random_labels(dims: &[usize], num_classes: usize, seed: u64) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed);
    let labels: Vec<i64> =
        (0..dims.iter().product()).map(|_| rng.random_range(0..num_classes as i64)).collect();
    Tensor::from_vec(labels, dims, &CPU)
}

/// Random probabilities that sum to 1 over `dim`, f64.
pub fn random_probabilities(dims: &[usize], dim: usize, seed: u64) -> Result<Tensor> {
    candle_nn::ops::softmax(&random(dims, 2., seed)?, dim)
}

/// All values in row-major order, as f64.
pub fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()
}

/// A loss with logits (f64) and targets.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    /// The loss without weights for the rows.
    pub loss: LabelSmoothingLoss,
    pub row_weights: Option<Tensor>,
    pub logits: Tensor,
    pub targets: Tensor,
}

impl Case {
    /// Computes the loss, and the logits' gradient of Σ grad_output·loss.
    pub fn run(&self, dtype: DType) -> Result<(Tensor, Tensor)> {
        self.run_with(dtype, |logits| self.forward(logits))
    }

    /// The same by the reference, which uses candle's operations.
    pub fn run_reference(&self, dtype: DType) -> Result<(Tensor, Tensor)> {
        let loss = self.loss_on(&CPU)?;
        self.run_with(dtype, |logits| {
            Ok(candle_label_smoothing::reference::forward(&loss, logits, &self.targets)?)
        })
    }

    /// The loss of these logits on the device under test.
    pub fn forward(&self, logits: &Tensor) -> Result<Tensor> {
        Ok(match &self.row_weights {
            Some(weights) => self.loss.weighted_on_device(weights, logits, &self.targets)?,
            None => self.loss.on_device(logits, &self.targets)?,
        })
    }

    /// The loss with the rows' weights on the device.
    pub fn loss_on(&self, device: &Device) -> Result<LabelSmoothingLoss> {
        Ok(match &self.row_weights {
            Some(weights) => self.loss.weigh_rows(&weights.to_device(device)?)?,
            None => self.loss.clone(),
        })
    }

    /// The same by any function of the logits.
    pub fn run_with(
        &self,
        dtype: DType,
        forward: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        let logits = Var::from_tensor(&self.logits.to_dtype(dtype)?)?;
        let loss = forward(&logits)?;
        let total = sum_with_grad_output(&loss)?;
        let gradient = total.backward()?.get(&logits).cloned();
        Ok((loss, gradient.expect("no gradient reached the logits")))
    }
}

/// Fixed random numbers from −1 to 1, f64.
pub fn random_grad_output(dims: &[usize]) -> Result<Tensor> {
    random(dims, 1., 99)
}

/// Σ grad_output·loss, with [`random_grad_output`].
pub fn sum_with_grad_output(loss: &Tensor) -> Result<Tensor> {
    let grad_output = random_grad_output(loss.dims())?.to_dtype(loss.dtype())?;
    (loss * grad_output.to_device(loss.device())?)?.sum_all()
}

pub fn smoothings(num_classes: usize) -> Result<Vec<(&'static str, Smoothing)>> {
    let prior = random_probabilities(&[num_classes], 0, 7)?;
    Ok(vec![
        ("none", Smoothing::none()),
        ("over_all(0.1)", Smoothing::over_all(0.1)?),
        ("over_all(1)", Smoothing::over_all(1.)?),
        ("over_others(0.1)", Smoothing::over_others(0.1)?),
        // ε above (K−1)/K gives the label less than each of the other classes.
        ("over_others(0.9)", Smoothing::over_others(0.9)?),
        ("over_others(1)", Smoothing::over_others(1.)?),
        ("toward(0.3)", Smoothing::toward(0.3, &prior)?),
    ])
}

/// Every combination of smoothing, class weights, ignore_index, z-loss, reduction and kind of
/// targets, for logits of shape `dims`. Then every choice of three of all options, each in several cases.
pub fn grid(dims: &[usize], class_dim: usize) -> Result<Vec<Case>> {
    Ok([full_grid(dims, class_dim)?, grid_of_triples(dims, class_dim)?].concat())
}

/// The cases, or a fifth of them in the packages `emulator` and `portable`: their tests run on emulated GPUs and processors, and
/// with sanitizers.
pub fn fewer_where_slow(cases: Vec<Case>) -> impl Iterator<Item = Case> {
    let is_slow = matches!(env!("CARGO_PKG_NAME"), "emulator" | "portable");
    cases.into_iter().step_by(if is_slow { 5 } else { 1 })
}

fn full_grid(dims: &[usize], class_dim: usize) -> Result<Vec<Case>> {
    let num_classes = dims[class_dim];
    let mut rows = dims.to_vec();
    rows.remove(class_dim);
    let logits = random(dims, 3., 1)?;
    let labels = random_labels(&rows, num_classes, 2)?;
    let probabilities = random_probabilities(dims, class_dim, 3)?;
    let weights = random(&[num_classes], 1., 4)?.abs()?;

    let mut cases = Vec::new();
    for (smoothing_name, smoothing) in smoothings(num_classes)? {
        for weighted in [false, true] {
            for z in [0., 0.01] {
                for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
                    let mut loss = LabelSmoothingLoss::new(smoothing.clone())
                        .with_reduction(reduction)
                        .with_class_dim(class_dim)
                        .with_z_loss(z)?;
                    if weighted {
                        loss = loss.with_class_weights(&weights)?;
                    }
                    let name =
                        format!("{smoothing_name}, weights {weighted}, z {z}, {reduction:?}");
                    let ignoring = loss.clone().with_ignore_index(1);
                    for (kind, loss, targets) in [
                        ("labels", loss.clone(), &labels),
                        ("labels, ignoring 1", ignoring, &labels),
                        ("probabilities", loss, &probabilities),
                    ] {
                        cases.push(Case {
                            name: format!("{name}, {kind}, {dims:?}/{class_dim}"),
                            loss,
                            row_weights: None,
                            logits: logits.clone(),
                            targets: targets.clone(),
                        });
                    }
                }
            }
        }
    }
    Ok(cases)
}

/// A seventh of the combinations of all options. The seventh contains every combination of any three of them.
fn grid_of_triples(dims: &[usize], class_dim: usize) -> Result<Vec<Case>> {
    let inputs = MaskedInputs::new(dims, class_dim)?;
    let rows = inputs.labels.dims();
    let num_classes = dims[class_dim];
    let class_weights = random(&[num_classes], 1., 4)?.abs()?;
    let prior = random_probabilities(&[num_classes], 0, 7)?;
    let smoothings = [
        ("none", Smoothing::none()),
        ("over_all(0.1)", Smoothing::over_all(0.1)?),
        ("over_others(0.9)", Smoothing::over_others(0.9)?),
        ("over_others(1)", Smoothing::over_others(1.)?),
        ("toward(0.3)", Smoothing::toward(0.3, &prior)?),
        ("over_unmasked(0.2)", Smoothing::over_unmasked(0.2)?),
        ("over_unmasked(1)", Smoothing::over_unmasked(1.)?),
    ];
    let num_rows: usize = rows.iter().product();
    let numbers: Vec<u8> = (0..num_rows).map(|row| [1, 0, 2][row % 3]).collect();
    let row_weights = [
        None,
        Some(Tensor::from_vec(numbers, rows, &CPU)?),
        Some(random(rows, 1., 8)?.abs()?.to_dtype(DType::F32)?),
    ];
    let reductions = [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::MeanOrZero];
    let maps = [(None, None), (Some(0.5), None), (None, Some(5.)), (Some(1.5), Some(2.))];
    let kinds = ["labels", "labels, ignoring 1", "probabilities"];
    let levels = [smoothings.len(), row_weights.len(), maps.len(), reductions.len(), 3, 2, 2];

    let mut cases = Vec::new();
    for combination in 0..levels.iter().product() {
        let mut rest = combination;
        let chosen = levels.map(|level| {
            let choice = rest % level;
            rest /= level;
            choice
        });
        // Any four of the options can make up for the choice of the other three.
        if chosen.iter().sum::<usize>() % 7 != 0 {
            continue;
        }
        let [smoothing, row_weight, map, reduction, kind, weighted, z] = chosen;
        let (smoothing_name, smoothing) = &smoothings[smoothing];
        let row_weights = row_weights[row_weight].clone();
        let ((scale, cap), reduction) = (maps[map], reductions[reduction]);
        let z_loss = [0., 0.01][z];
        let mut loss = LabelSmoothingLoss::new(smoothing.clone())
            .with_reduction(reduction)
            .with_class_dim(class_dim)
            .with_z_loss(z_loss)?;
        if weighted == 1 {
            loss = loss.with_class_weights(&class_weights)?;
        }
        if let Some(scale) = scale {
            loss = loss.with_logit_scale(scale)?;
        }
        if let Some(cap) = cap {
            loss = loss.with_softcap(cap)?;
        }
        if kind == 1 {
            loss = loss.with_ignore_index(1);
        }
        let is_masked = smoothing_name.starts_with("over_unmasked");
        let name = format!(
            "{smoothing_name}, row weights {:?}, scale {scale:?}, cap {cap:?}, {reduction:?}, {}, \
             weights {weighted}, z {z_loss}, {dims:?}/{class_dim}",
            row_weights.as_ref().map(Tensor::dtype),
            kinds[kind]
        );
        let logits = if is_masked { &inputs.masked_logits } else { &inputs.logits };
        let targets = match kind {
            2 if is_masked => &inputs.masked_probabilities,
            2 => &inputs.probabilities,
            _ => &inputs.labels,
        };
        let (logits, targets) = (logits.clone(), targets.clone());
        cases.push(Case { name, loss, row_weights, logits, targets });
    }
    Ok(cases)
}

/// Random logits and targets, f64. In the masked logits some logits are −inf, but none of a label.
pub struct MaskedInputs {
    pub logits: Tensor,
    pub masked_logits: Tensor,
    pub labels: Tensor,
    pub probabilities: Tensor,
    /// The probabilities, with 0 for the masked classes. Their sum need not be 1.
    pub masked_probabilities: Tensor,
}

impl MaskedInputs {
    pub fn new(dims: &[usize], class_dim: usize) -> Result<Self> {
        let mut rows = dims.to_vec();
        rows.remove(class_dim);
        let logits = random(dims, 3., 1)?;
        let labels = random_labels(&rows, dims[class_dim], 2)?;
        let probabilities = random_probabilities(dims, class_dim, 3)?;
        let classes: Vec<i64> = (0..dims[class_dim] as i64).collect();
        let mut shape = vec![1; dims.len()];
        shape[class_dim] = classes.len();
        let classes = Tensor::from_vec(classes, shape, &CPU)?;
        let is_label = classes.broadcast_eq(&labels.unsqueeze(class_dim)?)?;
        let mask = (random(dims, 1., 5)?.lt(-0.3)? * is_label.eq(0u8)?)?;
        let masked = |tensor: &Tensor, value: f64| {
            mask.where_cond(&Tensor::full(value, dims, &CPU)?, tensor)
        };
        let masked_logits = masked(&logits, f64::NEG_INFINITY)?;
        let masked_probabilities = masked(&probabilities, 0.)?;
        Ok(Self { logits, masked_logits, labels, probabilities, masked_probabilities })
    }
}

/// Relative error allowed in the gradient for the final rounding to each dtype. The error of the
/// arithmetic is added in `check_case`.
const DTYPES_AND_HALF_ULPS: [(DType, f64); 4] =
    [(DType::F64, 0.), (DType::F32, 0.), (DType::F16, 1. / 2048.), (DType::BF16, 1. / 256.)];

/// Compares the loss and the gradient with the reference in f64, in every dtype.
pub fn check_case(
    name: &str,
    loss: &LabelSmoothingLoss,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<()> {
    for (dtype, half_ulp) in DTYPES_AND_HALF_ULPS {
        // The reference gets the rounded logits that the kernels get.
        let logits = logits.to_dtype(dtype)?.to_dtype(DType::F64)?;
        let (loss, targets) = (loss.clone(), targets.clone());
        let case = Case { name: name.into(), loss, row_weights: None, logits, targets };
        let (losses, gradient) = case.run(dtype)?;
        let (expected_losses, expected_gradient) = case.run_reference(DType::F64)?;
        let roundings = if dtype == DType::F64 { 1e-13 } else { 4e-6 };
        for (actual, expected) in values(&losses)?.iter().zip(values(&expected_losses)?) {
            let error = (actual - expected).abs();
            assert!(
                error <= roundings * expected.abs().max(1.),
                "{name} {dtype:?}: {actual}, expected {expected}"
            );
        }
        for (i, (actual, expected)) in
            values(&gradient)?.iter().zip(values(&expected_gradient)?).enumerate()
        {
            // The ulp of subnormal f16 numbers is 2⁻²⁴.
            let allowed = roundings + half_ulp * expected.abs() + 2f64.powi(-25);
            let error = (actual - expected).abs();
            assert!(error <= allowed, "{name} {dtype:?} at {i}: {actual}, expected {expected}");
        }
    }
    Ok(())
}

pub fn unreduced(smoothing: Smoothing) -> LabelSmoothingLoss {
    LabelSmoothingLoss::new(smoothing).with_reduction(Reduction::None)
}

/// Checks every variant of the coefficients: a label above the other classes, a label below them,
/// one coefficient per class, and probabilities.
pub fn check_shape(dims: &[usize], class_dim: usize, seed: u64) -> Result<()> {
    let num_classes = dims[class_dim];
    let mut row_dims = dims.to_vec();
    row_dims.remove(class_dim);
    let logits = random(dims, 6., seed)?;
    let labels = random_labels(&row_dims, num_classes, seed + 1)?;
    let probabilities = random_probabilities(dims, class_dim, seed + 2)?;
    let weights = random(&[num_classes], 1., seed + 3)?.abs()?;

    let over_all =
        unreduced(Smoothing::over_all(0.1)?).with_class_dim(class_dim).with_ignore_index(0);
    let over_others = unreduced(Smoothing::over_others(1.)?).with_class_dim(class_dim);
    let weighted = over_all.clone().with_class_weights(&weights)?.with_z_loss(1e-3)?;
    let with_probabilities = unreduced(Smoothing::over_all(0.2)?).with_class_dim(class_dim);
    check_case(&format!("{dims:?} over all"), &over_all, &logits, &labels)?;
    check_case(&format!("{dims:?} weights"), &weighted, &logits, &labels)?;
    check_case(&format!("{dims:?} probabilities"), &with_probabilities, &logits, &probabilities)?;
    if num_classes > 1 {
        check_case(&format!("{dims:?} over others"), &over_others, &logits, &labels)?;
    }
    Ok(())
}
