//! Every option of the kernels, alone and together, against the formulas in f64.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::testing::{TileSize, forward_linear_tiled_with_metrics};
use candle_label_smoothing::{LabelSmoothingLoss, Metrics, Reduction, Smoothing};
use common::{CPU, random, random_labels, random_probabilities, sum_with_grad_output, values};

const ROWS: usize = 7;
const EPSILON: f64 = 0.2;
const Z: f64 = 0.01;
/// The label of this class is ignored.
const IGNORED: f64 = 2.;

/// The options of a loss, as bits.
#[derive(Clone, Copy, Debug)]
struct Options(u32);

impl Options {
    const COUNT: u32 = 8;

    fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 > 0
    }
    fn scales(self) -> bool {
        self.has(0)
    }
    fn caps(self) -> bool {
        self.has(1)
    }
    fn weighs_rows(self) -> bool {
        self.has(2)
    }
    fn spreads_over_unmasked(self) -> bool {
        self.has(3)
    }
    fn weighs_classes(self) -> bool {
        self.has(4)
    }
    fn has_probabilities(self) -> bool {
        self.has(5)
    }
    fn ignores(self) -> bool {
        self.has(6) && !self.has_probabilities()
    }
    fn averages(self) -> bool {
        self.has(7)
    }
}

struct Case {
    options: Options,
    /// (rows, classes) in f64, rounded to the dtype.
    logits: Tensor,
    /// (rows), or (rows, classes) in f64.
    targets: Tensor,
    class_weights: Tensor,
    row_weights: Tensor,
}

/// What the kernels compute of each row, and the gradient of Σ grad_output·loss.
struct Expected {
    loss: Vec<f64>,
    gradient: Vec<f64>,
    /// In the order of the fields of `Metrics`.
    metrics: Vec<[f64; 7]>,
}

impl Case {
    fn new(options: Options, num_classes: usize, dtype: DType) -> Result<Self> {
        let dims = [ROWS, num_classes];
        // Every third class of some rows is masked, but not the label and not if a masked class has a share of ε.
        let logits = random(&dims, 4., 1)?.to_dtype(dtype)?.to_dtype(DType::F64)?;
        let labels = random_labels(&[ROWS], num_classes, 2)?;
        let mut given = values(&logits)?;
        if options.spreads_over_unmasked() && !options.has_probabilities() {
            for (row, label) in labels.to_vec1::<i64>()?.into_iter().enumerate().skip(2) {
                for class in
                    (row % 3..num_classes).step_by(3).filter(|class| *class != label as usize)
                {
                    given[row * num_classes + class] = f64::NEG_INFINITY;
                }
            }
        }
        let targets = match options.has_probabilities() {
            true => random_probabilities(&dims, 1, 3)?,
            false => labels,
        };
        Ok(Self {
            options,
            logits: Tensor::from_vec(given, &dims[..], &CPU)?,
            targets,
            class_weights: (random(&[num_classes], 1., 4)?.abs()? + 0.1)?,
            row_weights: Tensor::new(&[1f32, 0., 2.5, 0.25, 3., -0., 0.5], &CPU)?,
        })
    }

    fn loss(&self) -> candle_label_smoothing::Result<LabelSmoothingLoss> {
        let options = self.options;
        let smoothing = match options.spreads_over_unmasked() {
            true => Smoothing::over_unmasked(EPSILON)?,
            false => Smoothing::over_all(EPSILON)?,
        };
        let reduction = if options.averages() { Reduction::MeanOrZero } else { Reduction::None };
        let mut loss =
            LabelSmoothingLoss::new(smoothing).with_reduction(reduction).with_z_loss(Z)?;
        if options.scales() {
            loss = loss.with_logit_scale(0.75)?;
        }
        if options.caps() {
            loss = loss.with_softcap(2.5)?;
        }
        if options.weighs_classes() {
            loss = loss.with_class_weights(&self.class_weights)?;
        }
        if options.ignores() {
            loss = loss.with_ignore_index(IGNORED as i64);
        }
        if options.weighs_rows() {
            loss = loss.weigh_rows(&self.row_weights)?;
        }
        Ok(loss)
    }

    fn expected(&self) -> Result<Expected> {
        let options = self.options;
        let (logits, targets) = (values(&self.logits)?, values(&self.targets)?);
        let (class_weights, row_weights) =
            (values(&self.class_weights)?, values(&self.row_weights)?);
        let num_classes = logits.len() / ROWS;
        let scale = if options.scales() { 0.75 } else { 1. };
        let map = |x: f64| match (x == f64::NEG_INFINITY, options.caps()) {
            (true, _) => x,
            (_, true) => 2.5 * (scale * x / 2.5).tanh(),
            (_, false) => scale * x,
        };
        let slope = |x: f64| match options.caps() {
            true => scale / (scale * x / 2.5).cosh().powi(2),
            false => scale,
        };
        let (mut losses, mut gradient, mut metrics) = (vec![], vec![], vec![]);
        let mut divisor = 0.;
        let mut grad_outputs = values(&random(&[ROWS], 1., 99)?)?;
        if options.averages() {
            grad_outputs = vec![values(&random(&[], 1., 99)?)?[0]; ROWS];
        }
        for row in 0..ROWS {
            let given = &logits[row * num_classes..][..num_classes];
            let x: Vec<f64> = given.iter().map(|x| map(*x)).collect();
            let class_weight =
                |class: usize| if options.weighs_classes() { class_weights[class] } else { 1. };
            let row_weight = if options.weighs_rows() { row_weights[row] } else { 1. };
            let is_ignored = row_weight == 0. || options.ignores() && targets[row] == IGNORED;
            if is_ignored {
                losses.push(0.);
                gradient.extend(vec![0.; num_classes]);
                metrics.push([0.; 7]);
                continue;
            }
            let num_unmasked = given.iter().filter(|x| **x > f64::NEG_INFINITY).count() as f64;
            let r: Vec<f64> = (0..num_classes)
                .map(|class| {
                    let p = match options.has_probabilities() {
                        true => targets[row * num_classes + class],
                        false => f64::from(u8::from(targets[row] == class as f64)),
                    };
                    let share = match options.spreads_over_unmasked() {
                        true if given[class] == f64::NEG_INFINITY => 0.,
                        true => 1. / num_unmasked,
                        false => 1. / num_classes as f64,
                    };
                    class_weight(class) * ((1. - EPSILON) * p + EPSILON * share)
                })
                .collect();
            let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
            let sum: f64 = r.iter().sum();
            let terms = r.iter().zip(&x).filter(|(r, _)| **r != 0.).map(|(r, x)| r * (lse - x));
            losses.push(row_weight * (terms.sum::<f64>() + Z * lse * lse));
            let label = targets[row.min(targets.len() - 1)] as usize;
            divisor +=
                row_weight * if options.has_probabilities() { 1. } else { class_weight(label) };
            for (class, x) in x.iter().enumerate() {
                let g = (x - lse).exp() * (sum + 2. * Z * lse) - r[class];
                gradient.push(grad_outputs[row] * row_weight * g * slope(given[class]));
            }
            let prediction = x.iter().position(|x| *x == max).unwrap_or(0);
            let is_correct = f64::from(u8::from(prediction == label));
            let probabilities = x.iter().map(|x| (x - lse).exp());
            let entropy = -probabilities.filter(|p| *p > 0.).map(|p| p * p.ln()).sum::<f64>();
            let nll = lse - x[label.min(num_classes - 1)];
            metrics.push([nll, prediction as f64, is_correct, (max - lse).exp(), entropy, lse, 1.]);
        }
        if options.averages() {
            losses = vec![losses.iter().sum::<f64>() / divisor];
            gradient.iter_mut().for_each(|g| *g /= divisor);
        }
        Ok(Expected { loss: losses, gradient, metrics })
    }

    /// Compares the kernels with the formulas, with the classes last or first.
    fn check(&self, dtype: DType, class_dim: usize) -> Result<()> {
        let name =
            format!("{:?} {dtype:?} {:?}, dim {class_dim}", self.options, self.logits.dims());
        let turned = |tensor: &Tensor| match class_dim {
            0 if tensor.rank() == 2 => tensor.t()?.contiguous(),
            _ => Ok(tensor.clone()),
        };
        let expected = self.expected()?;
        let loss = self.loss()?.with_class_dim(class_dim);
        let variable = Var::from_tensor(&turned(&self.logits)?.to_dtype(dtype)?)?;
        let targets = turned(&self.targets)?;
        let actual = loss.forward(&variable, &targets)?;
        let gradient = sum_with_grad_output(&actual)?.backward()?;
        let gradient = gradient.get(&variable).cloned().expect("no gradient");
        let half_ulp = match dtype {
            DType::F16 => 1. / 2048.,
            DType::BF16 => 1. / 256.,
            _ => 0.,
        };
        assert_close(&name, dtype, 0., &values(&actual)?, &expected.loss);
        assert_close(&name, dtype, half_ulp, &values(&turned(&gradient)?)?, &expected.gradient);
        if self.options.has_probabilities() {
            return Ok(());
        }
        let (with_metrics, metrics) = loss.forward_with_metrics(&variable, &targets)?;
        assert_eq!(values(&with_metrics)?, values(&actual)?, "{name}");
        let gradient_too = sum_with_grad_output(&with_metrics)?.backward()?;
        let gradient_too = gradient_too.get(&variable).cloned().expect("no gradient");
        assert_eq!(values(&gradient_too)?, values(&gradient)?, "{name}");
        self.check_metrics(&name, dtype, &metrics, &expected)
    }

    fn check_metrics(
        &self,
        name: &str,
        dtype: DType,
        metrics: &Metrics,
        expected: &Expected,
    ) -> Result<()> {
        let Metrics { nll, prediction, correct, confidence, entropy, lse, counted, .. } = metrics;
        let fields = [nll, prediction, correct, confidence, entropy, lse, counted];
        for (i, field) in fields.into_iter().enumerate() {
            let expected: Vec<f64> = expected.metrics.iter().map(|row| row[i]).collect();
            // Capped logits may be equal in f32 that are not in f64.
            assert_close(&format!("{name}, metric {i}"), dtype, 0., &values(field)?, &expected);
        }
        Ok(())
    }

    /// Compares `forward_linear` with the formulas: the logits are those of the weight, for hidden states that are unit vectors.
    fn check_linear(&self, tile: TileSize) -> Result<()> {
        let name = format!("{:?}, {tile:?}", self.options);
        let expected = self.expected()?;
        // 0·∞ is NaN in a multiplication.
        let logits = self.logits.clamp(-1e300, 1e300)?;
        if values(&logits)? != values(&self.logits)? {
            return Ok(());
        }
        let (hidden, weight) =
            (Tensor::eye(ROWS, DType::F64, &CPU)?, Var::from_tensor(&logits.t()?)?);
        let (loss, metrics) = forward_linear_tiled_with_metrics(
            &self.loss()?,
            &hidden,
            &weight,
            None,
            &self.targets,
            tile,
        )?;
        assert_close(&name, DType::F64, 0., &values(&loss)?, &expected.loss);
        let gradients = sum_with_grad_output(&loss)?.backward()?;
        let gradient = gradients.get(&weight).expect("no gradient").t()?;
        assert_close(&name, DType::F64, 0., &values(&gradient)?, &expected.gradient);
        self.check_metrics(&name, DType::F64, &metrics, &expected)
    }
}

fn assert_close(name: &str, dtype: DType, half_ulp: f64, actual: &[f64], expected: &[f64]) {
    let roundings = if dtype == DType::F64 { 1e-12 } else { 6e-6 };
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let allowed = roundings * expected.abs().max(1.)
            + half_ulp * expected.abs()
            + 3e-8 * half_ulp.signum();
        let is_close = (actual - expected).abs() <= allowed || actual == expected;
        assert!(is_close, "{name}, {i}: {actual}, expected {expected}");
    }
}

fn all_options() -> impl Iterator<Item = Options> {
    (0..1 << Options::COUNT)
        .map(Options)
        .filter(|options| !options.has_probabilities() || !options.has(6))
}

#[test]
fn all_options_in_f64() -> Result<()> {
    for options in all_options() {
        for num_classes in [5, 301] {
            for class_dim in [0, 1] {
                Case::new(options, num_classes, DType::F64)?.check(DType::F64, class_dim)?;
            }
        }
    }
    Ok(())
}

#[test]
fn all_options_in_other_dtypes() -> Result<()> {
    for options in all_options() {
        for (dtype, num_classes) in [(DType::F32, 300), (DType::F16, 264), (DType::BF16, 1000)] {
            for class_dim in [0, 1] {
                Case::new(options, num_classes, dtype)?.check(dtype, class_dim)?;
            }
        }
    }
    Ok(())
}

#[test]
fn options_of_long_rows() -> Result<()> {
    for options in [0, 0b1111, 0b101_1111, 0b10_1111, 0b1001_1100].map(Options) {
        for class_dim in [0, 1] {
            Case::new(options, 40_003, DType::F64)?.check(DType::F64, class_dim)?;
        }
    }
    Ok(())
}

#[test]
fn tiles_of_every_option() -> Result<()> {
    for options in all_options().filter(|options| !options.has_probabilities()) {
        let case = Case::new(options, 23, DType::F64)?;
        case.check_linear(TileSize { rows: 3, classes: 5 })?;
    }
    Ok(())
}

/// The type, the layout and bad values of row weights.
#[test]
fn row_weights_of_every_type() -> Result<()> {
    let logits = Var::from_tensor(&random(&[2, 3, 5], 2., 1)?.to_dtype(DType::F32)?)?;
    let targets = random_labels(&[2, 3], 5, 2)?;
    let weights = Tensor::new(&[[1f32, 0.], [2., 3.], [0., 4.]], &CPU)?;
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let losses = values(&plain.forward(&logits, &targets)?)?;
    let of_rows = values(&weights.t()?)?;
    for dtype in [DType::U8, DType::F8E4M3, DType::F16, DType::BF16, DType::F32, DType::F64] {
        let loss = plain.weigh_rows(&weights.to_dtype(dtype)?.t()?)?.forward(&logits, &targets)?;
        for ((loss, plain), weight) in values(&loss)?.into_iter().zip(&losses).zip(&of_rows) {
            assert!((loss - plain * weight).abs() < 1e-6, "{dtype:?}: {loss}, {plain}, {weight}");
        }
    }
    // A label that is ignored does not hide a bad weight.
    let ignoring = plain.clone().with_ignore_index(values(&targets)?[1] as i64);
    for (bad, loss) in [-1f32, f32::NAN, f32::INFINITY, f32::NEG_INFINITY]
        .into_iter()
        .flat_map(|bad| [(bad, &plain), (bad, &ignoring)])
    {
        let weights = Tensor::new(&[[1f32, bad, 1.], [0., 1., 1.]], &CPU)?;
        // The mean is NaN, but not its divisor, which the gradients of all rows have.
        for (reduction, is_nan) in [
            (Reduction::None, &[false, true, false, false, false, false][..]),
            (Reduction::Mean, &[true]),
        ] {
            let loss = loss.clone().with_reduction(reduction).weigh_rows(&weights)?;
            let loss = loss.forward(&logits, &targets)?;
            let gradients = loss.backward()?;
            let gradient = values(gradients.get(&logits).expect("no gradient"))?;
            let loss: Vec<bool> = values(&loss)?.into_iter().map(f64::is_nan).collect();
            assert_eq!(loss, is_nan, "{bad}, {reduction:?}");
            for (row, gradient) in gradient.chunks(5).enumerate() {
                let expected = row == 1;
                assert!(gradient.iter().all(|g| g.is_nan() == expected), "{bad}: row {row}");
            }
        }
    }
    Ok(())
}

/// Capped logits where y/cap has no digits, near saturation, and of infinite logits.
#[test]
fn capped_logits() -> Result<()> {
    for cap in [1e-3, 2., 1e12] {
        let given = [1e-40f32, -3e-20, 1e-4, 0.3, -5., 11., 1e30, -f32::MAX, f32::INFINITY];
        for x in given {
            // The difference of the losses of two classes is that of their logits.
            let logits = Tensor::new(&[[x, 0.], [x, 0.]], &CPU)?;
            let loss = LabelSmoothingLoss::new(Smoothing::none())
                .with_reduction(Reduction::None)
                .with_logit_scale(2.)?
                .with_softcap(cap)?;
            let losses = values(&loss.forward(&logits, &Tensor::new(&[0i64, 1], &CPU)?)?)?;
            let expected = cap * (2. * f64::from(x) / cap).tanh();
            let allowed = 2e-6 * (1. + expected.abs());
            assert!((losses[1] - losses[0] - expected).abs() < allowed, "{cap}: {x}, {losses:?}");
        }
    }
    Ok(())
}

#[test]
fn the_mean_of_nothing() -> Result<()> {
    let nan = Tensor::full(f32::NAN, (3, 5), &CPU)?;
    let logits = Var::from_tensor(&nan)?;
    let targets = Tensor::new(&[1i64, 2, 3], &CPU)?;
    let loss =
        LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::MeanOrZero);
    let zeros = loss.clone().with_class_weights(&Tensor::zeros(5, DType::F32, &CPU)?)?;
    for loss in [loss.weigh_rows(&Tensor::zeros(3, DType::F32, &CPU)?)?, zeros.clone()] {
        let mean = loss.forward(&logits, &targets)?;
        assert_eq!(values(&mean)?, [0.]);
        assert_eq!(values(mean.backward()?.get(&logits).expect("no gradient"))?, [0.; 15]);
    }
    let out_of_range = zeros.forward(&logits, &Tensor::new(&[1i64, 7, 3], &CPU)?)?;
    assert!(values(&out_of_range)?[0].is_nan());
    let bad_weight = zeros.weigh_rows(&Tensor::new(&[1f32, -1., 1.], &CPU)?)?;
    assert!(values(&bad_weight.forward(&logits, &targets)?)?[0].is_nan());
    let empty = Tensor::zeros((0, 5), DType::F32, &CPU)?;
    assert_eq!(values(&loss.forward(&empty, &Tensor::zeros(0, DType::I64, &CPU)?)?)?, [0.]);
    Ok(())
}

/// Rows of NaN, of infinite logits, and with a label out of range.
#[test]
fn metrics_of_odd_rows() -> Result<()> {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows = [
        [0., nan, 1.],
        [-inf, -inf, -inf],
        [0., inf, 1.],
        [nan, inf, 0.],
        [1., -inf, 1.],
        [0., 3., 1.],
        [f32::MIN; 3],
    ];
    let logits = Tensor::new(&rows, &CPU)?;
    let targets = Tensor::new(&[0i64, 0, 1, 1, 1, 9, 1], &CPU)?;
    for class_dim in [1, 0] {
        let loss = LabelSmoothingLoss::new(Smoothing::none()).with_class_dim(class_dim);
        let logits = if class_dim == 0 { logits.t()?.contiguous()? } else { logits.clone() };
        let (_, metrics) = loss.forward_with_metrics(&logits, &targets)?;
        assert_eq!(metrics.prediction.to_vec1::<u32>()?, [0, 0, 1, 0, 0, 1, 0]);
        assert_eq!(values(&metrics.correct)?, [0., 0., 1., 0., 0., 0., 0.]);
        assert_eq!(values(&metrics.counted)?, [1.; 7]);
        let nll = values(&metrics.nll)?;
        assert!(
            nll[..2].iter().all(|x| x.is_nan()) && nll[3].is_nan() && nll[5].is_nan(),
            "{nll:?}"
        );
        assert_eq!(nll[4], f64::INFINITY);
        let entropy = values(&metrics.entropy)?;
        assert!(entropy[0].is_nan() && entropy[1].is_nan() && entropy[3].is_nan());
        assert!((entropy[4] - 2f64.ln()).abs() < 1e-6 && entropy[5].is_finite(), "{entropy:?}");
    }
    Ok(())
}
