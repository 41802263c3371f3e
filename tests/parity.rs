//! The loss and its gradient against PyTorch's results, in every dtype.
//!
//! `data/parity.safetensors` holds inputs, losses and gradients for five tables of cases, and metrics for the last one.
//! `data/parity.py` made it with torch in f64 and describes the tables. The tests need only the
//! file. Every input is exact in bf16 and f16 too, so the f64 results are the reference for every
//! dtype. The only errors are the rounding of the arithmetic and the rounding of the result.
//!
//! `cargo test --test parity -- --nocapture` prints the largest error of each dtype relative to its
//! tolerance.

mod common;

use std::collections::{BTreeSet, HashMap};
use std::error::Error;

use approx::abs_diff_eq;
use candle_core::{DType, Device, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Metrics, Reduction, Smoothing, reference};

use common::OnDevice;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];
const INTEGERS: [DType; 5] = [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64];

/// Number of cases in each table. PyTorch's ModuleInfo has 3 reductions × (5 options × 4 ranks + 3
/// options × 5 more shapes), its OpInfo 11 × 2 - 1. The other tables are this crate's own.
const TABLES: [(&str, usize); 5] =
    [("moduleinfo", 105), ("opinfo", 21), ("torch", 198), ("formula", 488), ("options", 60)];

#[test]
fn moduleinfo() -> Result<()> {
    run("moduleinfo")
}

#[test]
fn opinfo() -> Result<()> {
    run("opinfo")
}

#[test]
fn torch() -> Result<()> {
    run("torch")
}

#[test]
fn formula() -> Result<()> {
    run("formula")
}

#[test]
fn options() -> Result<()> {
    run("options")
}

/// The logits are at most 9, and 13.5 after the scale. The size of the numbers and of their terms is below 20.
#[test]
fn metrics() -> Result<()> {
    let (file, mut wrong, mut count) = (load()?, Vec::new(), 0);
    for case in cases(&file)? {
        let Some(expected) = file.get(&format!("metrics/{}", case.name)) else { continue };
        count += 1;
        let targets = &targets(tensor(&file, case.need("targets")?)?)?[0];
        for dtype in common::dtypes() {
            let logits = tensor(&file, case.need("logits")?)?.to_dtype(dtype)?;
            let row_weights = case.row_weights(&file, dtype)?;
            let loss = case.loss(&file, dtype)?;
            let (_, metrics) = loss.metrics_on_device(row_weights.as_ref(), &logits, targets)?;
            let Metrics { nll, prediction, confidence, entropy, lse, .. } = &metrics;
            for (i, field) in [nll, prediction, confidence, entropy, lse].into_iter().enumerate() {
                let expected = numbers(&expected.get(i)?)?;
                let actual = numbers(&field.to_device(&Device::Cpu)?)?;
                assert_eq!(actual.len(), expected.len(), "{}", case.name);
                for (actual, expected) in actual.iter().zip(expected) {
                    let tolerance = arithmetic(dtype, LOSS_ROUNDINGS, 20.0);
                    if !abs_diff_eq!(*actual, expected, epsilon = tolerance) {
                        let name = &case.name;
                        wrong.push(format!("{name} {dtype:?}, {i}: {actual} is not {expected}"));
                    }
                }
            }
        }
    }
    assert_eq!(count, 30, "cases with metrics");
    report(&wrong);
    Ok(())
}

/// The reference of the other tests matches torch too. The test runs in f64 only, as the other
/// tests use the reference in f64.
#[test]
fn reference_matches_every_table() -> Result<()> {
    let file = load()?;
    let mut wrong = Vec::new();
    for case in cases(&file)? {
        let targets = &targets(tensor(&file, case.need("targets")?)?)?[0];
        let (name, worst) = (&case.name, &mut Worst::default());
        match compare(&file, &case, by_reference, DType::F64, targets, name, worst) {
            Ok(more) => wrong.extend(more),
            Err(error) => wrong.push(format!("{name}: {error}")),
        }
    }
    report(&wrong);
    Ok(())
}

/// Every case and every tensor of the file is used, so an incomplete table fails.
#[test]
fn every_case_and_tensor_of_the_file_is_used() -> Result<()> {
    let file = load()?;
    let cases = cases(&file)?;
    for (table, count) in TABLES {
        let found = cases.iter().filter(|c| c.table() == table).count();
        assert_eq!(found, count, "cases of the table {table}");
    }
    assert_eq!(cases.len(), TABLES.iter().map(|t| t.1).sum::<usize>(), "cases in all");
    let names: BTreeSet<_> = cases.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "case names are unique");

    let mut read = BTreeSet::from(["cases".to_string()]);
    for case in &cases {
        read.extend(["loss", "grad", "size"].map(|kind| format!("{kind}/{}", case.name)));
        if case.table() == "options" && tensor(&file, case.need("targets")?)?.dtype().is_int() {
            read.insert(format!("metrics/{}", case.name));
        }
        for key in ["logits", "targets", "weights", "prior", "upstream", "row_weights"] {
            read.extend(case.get(key).map(str::to_string));
        }
    }
    let stored: BTreeSet<_> = file.keys().cloned().collect();
    let odd: Vec<_> = stored.symmetric_difference(&read).collect();
    assert!(odd.is_empty(), "named or stored, not both: {odd:?}");
    Ok(())
}

// The error of the arithmetic is bounded by a number of roundings, in units of u·size.
//
// u is half the distance from 1 to the next number: 2^-53 in f64, and 2^-24 in f32, the dtype of
// the arithmetic for f16 and bf16 too. `size` is stored in the file. It is the sum of the absolute
// values of the terms of a number:
//
//   loss of a row    Σ_k t_k·(lse - x_k + 1) + z·(lse² + |lse|)
//   its gradient     softmax_k·(Σ_j t_j + 2z·|lse|)·(1 + lse - x_k) + t_k
//   with             t_k = |(1-e)·w_k·p_k| + |e·w_k·π_k|
//
// With a scale or a softcap, 1 + lse - x_k grows by |x_k| and by its mean over the softmax, since
// the logits are rounded themselves, and the gradient has the factor scale·(1 + tanh²).
//
// Both are multiplied by grad_output, or divided by the divisor of the mean. The factor lse - x_k
// accounts for the relative rounding of the logarithm and of the exponent. The term 1 accounts for
// the relative error of the sum of exponentials, which its logarithm makes absolute.
//
// A term of the loss has up to seven roundings: three in its coefficient, two in lse - x_k or its
// parts, one in the product and one in the sum. A term of the gradient also has seven: two in the
// exponential, three in its factor, one in the product and one in the subtraction. Roundings
// partly cancel. The largest measured errors on the CPU are 2.3 (loss) and 3.4 (gradient) in f32.
// The f64 tolerance is twice as large, because torch's results are rounded as often. The largest
// measured f64 errors are 4.7 and 5.0.
const LOSS_ROUNDINGS: f64 = 4.0;
const GRAD_ROUNDINGS: f64 = 5.0;

/// Upper bound of the f64 tolerance.
const F64_CEILING: f64 = 1e-9;

/// Error bound of the arithmetic for a number of the given size. `size` is zero where no terms are
/// added, for example in ignored rows. The result is exactly zero there.
fn arithmetic(dtype: DType, roundings: f64, size: f64) -> f64 {
    match dtype {
        // torch computed its results in f64 too, with as many roundings.
        DType::F64 => (2.0 * roundings * 2f64.powi(-53) * size).min(F64_CEILING),
        _ => roundings * 2f64.powi(-24) * size,
    }
}

/// Half the distance between two adjacent numbers of a dtype around `value`, the error of the final
/// rounding. For f32 and f64 this rounding is part of the arithmetic.
fn half_ulp(dtype: DType, value: f64) -> f64 {
    let (digits, smallest) = match dtype {
        DType::F16 => (11, -14),
        DType::BF16 => (8, -126),
        _ => return 0.0,
    };
    if value == 0.0 {
        return 0.0;
    }
    let exponent = ((value.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    2f64.powi(exponent.max(smallest) - digits)
}

type File = HashMap<String, Tensor>;

fn load() -> Result<File> {
    let bytes = include_bytes!("data/parity.safetensors");
    Ok(candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?)
}

/// Keys that a line of the table may have. The parser rejects others, because an option that is not
/// read is not tested.
const KEYS: [&str; 14] = [
    "logits",
    "targets",
    "reduction",
    "smoothing",
    "epsilon",
    "class_dim",
    "weights",
    "ignore",
    "prior",
    "upstream",
    "z",
    "row_weights",
    "scale",
    "cap",
];

/// One line of the table: the case's name, then `key=value` with names of tensors and options.
struct Case {
    name: String,
    options: HashMap<String, String>,
}

fn cases(file: &File) -> Result<Vec<Case>> {
    let text = String::from_utf8(tensor(file, "cases")?.to_vec1::<u8>()?)?;
    let case = |line: &str| -> Result<Case> {
        let mut words = line.split(' ');
        let name = words.next().unwrap_or_default().to_string();
        let mut options = HashMap::new();
        for word in words {
            let (key, value) = word.split_once('=').ok_or(format!("{name}: {word}"))?;
            if !KEYS.contains(&key) {
                return Err(format!("{name}: no option is called {key}").into());
            }
            options.insert(key.to_string(), value.to_string());
        }
        Ok(Case { name, options })
    };
    text.lines().map(case).collect()
}

fn tensor<'a>(file: &'a File, name: &str) -> Result<&'a Tensor> {
    Ok(file.get(name).ok_or(format!("no tensor {name}"))?)
}

impl Case {
    fn table(&self) -> &str {
        self.name.split('/').next().unwrap_or_default()
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.options.get(key).map(String::as_str)
    }

    fn need(&self, key: &str) -> Result<&str> {
        Ok(self.get(key).ok_or(format!("{} has no {key}", self.name))?)
    }

    fn input<'a>(&self, file: &'a File, key: &str) -> Result<Option<&'a Tensor>> {
        self.get(key).map(|name| tensor(file, name)).transpose()
    }

    /// The loss with this case's options. Class weights and prior are in `dtype`.
    fn loss(&self, file: &File, dtype: DType) -> Result<LabelSmoothingLoss> {
        let epsilon = || -> Result<f64> { Ok(self.need("epsilon")?.parse()?) };
        let smoothing = match self.need("smoothing")? {
            "none" => Smoothing::none(),
            "over_all" => Smoothing::over_all(epsilon()?)?,
            "over_others" => Smoothing::over_others(epsilon()?)?,
            "over_unmasked" => Smoothing::over_unmasked(epsilon()?)?,
            "toward" => {
                let prior = tensor(file, self.need("prior")?)?.to_dtype(dtype)?;
                Smoothing::toward(epsilon()?, &prior)?
            }
            other => return Err(format!("no smoothing is called {other}").into()),
        };
        let mut loss = LabelSmoothingLoss::new(smoothing).with_reduction(self.reduction()?);
        if let Some(weights) = self.input(file, "weights")? {
            loss = loss.with_class_weights(&weights.to_dtype(dtype)?)?;
        }
        if let Some(index) = self.get("ignore") {
            loss = loss.with_ignore_index(index.parse()?);
        }
        if let Some(dim) = self.get("class_dim") {
            loss = loss.with_class_dim(dim.parse()?);
        }
        if let Some(z) = self.get("z") {
            loss = loss.with_z_loss(z.parse()?)?;
        }
        if let Some(scale) = self.get("scale") {
            loss = loss.with_logit_scale(scale.parse()?)?;
        }
        if let Some(cap) = self.get("cap") {
            loss = loss.with_softcap(cap.parse()?)?;
        }
        Ok(loss)
    }

    /// A mask in u8, or numbers in `dtype`.
    fn row_weights(&self, file: &File, dtype: DType) -> Result<Option<Tensor>> {
        let Some(weights) = self.input(file, "row_weights")? else { return Ok(None) };
        let dtype = if weights.dtype().is_int() { DType::U8 } else { dtype };
        Ok(Some(weights.to_dtype(dtype)?))
    }

    fn reduction(&self) -> Result<Reduction> {
        match self.need("reduction")? {
            "none" => Ok(Reduction::None),
            "sum" => Ok(Reduction::Sum),
            "mean" => Ok(Reduction::Mean),
            other => Err(format!("no reduction is called {other}").into()),
        }
    }
}

/// Labels in every integer dtype that can hold them, probabilities in every float dtype. All
/// conversions are exact.
fn targets(stored: &Tensor) -> Result<Vec<Tensor>> {
    if stored.dtype().is_float() {
        return Ok(FLOATS
            .iter()
            .map(|dtype| stored.to_dtype(*dtype))
            .collect::<candle_core::Result<_>>()?);
    }
    let values = stored.to_dtype(DType::I64)?;
    let mut all = Vec::new();
    for dtype in INTEGERS {
        let cast = values.to_dtype(dtype)?;
        let back = cast.to_dtype(DType::I64)?.flatten_all()?;
        if back.to_vec1::<i64>()? == values.flatten_all()?.to_vec1::<i64>()? {
            all.push(cast);
        }
    }
    Ok(all)
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The largest error relative to its tolerance, and the case where it occurred.
#[derive(Default)]
struct Worst(HashMap<(DType, &'static str), (f64, String)>);

/// The comparison of one tensor of one case in one dtype.
struct Comparison<'a> {
    what: &'static str,
    label: &'a str,
    logits: DType,
    roundings: f64,
    want: &'a Tensor,
    sizes: &'a [f64],
}

impl Comparison<'_> {
    /// Returns a message for each mismatch.
    fn check(&self, got: &Tensor, dtype: DType, worst: &mut Worst) -> Result<Vec<String>> {
        let Self { what, label, .. } = self;
        if got.dtype() != dtype || got.dims() != self.want.dims() {
            let (a, b) = (got.dims(), self.want.dims());
            let found = got.dtype();
            return Ok(vec![format!("{label}: {what} is {found:?} {a:?}, not {dtype:?} {b:?}")]);
        }
        let (got, want) = (numbers(got)?, numbers(self.want)?);
        assert_eq!(want.len(), self.sizes.len(), "{label}: sizes of the {what}");
        let mut wrong = Vec::new();
        for (i, ((got, want), size)) in got.iter().zip(&want).zip(self.sizes).enumerate() {
            let arithmetic = arithmetic(self.logits, self.roundings, *size);
            let tolerance = arithmetic + half_ulp(dtype, want.abs() + arithmetic);
            let error = (got - want).abs();
            if !abs_diff_eq!(*got, *want, epsilon = tolerance) {
                wrong.push(format!(
                    "{label}: {what}[{i}] is {got:e}, not {want:e}: \
                     off by {error:.2e}, {tolerance:.2e} allowed"
                ));
            }
            let share = if error == 0.0 { 0.0 } else { error / tolerance };
            let entry = worst.0.entry((self.logits, what)).or_default();
            if share > entry.0 {
                *entry = (share, label.to_string());
            }
        }
        Ok(wrong)
    }
}

/// Fails with the first messages if there are any.
fn report(wrong: &[String]) {
    let shown = &wrong[..wrong.len().min(40)];
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), shown.join("\n"));
}

/// The function under test, of the loss, row weights, logits and targets.
type Forward = fn(
    &LabelSmoothingLoss,
    Option<&Tensor>,
    &Tensor,
    &Tensor,
) -> candle_label_smoothing::Result<Tensor>;

fn fused(
    loss: &LabelSmoothingLoss,
    row_weights: Option<&Tensor>,
    logits: &Tensor,
    targets: &Tensor,
) -> candle_label_smoothing::Result<Tensor> {
    match row_weights {
        Some(weights) => loss.weighted_on_device(weights, logits, targets),
        None => loss.on_device(logits, targets),
    }
}

fn by_reference(
    loss: &LabelSmoothingLoss,
    row_weights: Option<&Tensor>,
    logits: &Tensor,
    targets: &Tensor,
) -> candle_label_smoothing::Result<Tensor> {
    let loss = match row_weights {
        Some(weights) => loss.weigh_rows(weights)?,
        None => loss.clone(),
    };
    reference::forward(&loss, logits, targets)
}

/// Runs every case of a table, in every dtype of the logits and of the targets.
fn run(table: &str) -> Result<()> {
    let file = load()?;
    let (mut wrong, mut worst, mut count) = (Vec::new(), Worst::default(), 0);
    for case in cases(&file)?.iter().filter(|c| c.table() == table) {
        count += 1;
        for dtype in common::dtypes() {
            for targets in targets(tensor(&file, case.need("targets")?)?)? {
                let label = format!("{} with {dtype:?} and {:?}", case.name, targets.dtype());
                match compare(&file, case, fused, dtype, &targets, &label, &mut worst) {
                    Ok(more) => wrong.extend(more),
                    Err(error) => wrong.push(format!("{label}: {error}")),
                }
            }
        }
    }
    println!("{table}, the worst error as a share of its tolerance:");
    for dtype in FLOATS {
        for what in ["loss", "gradient"] {
            if let Some((share, label)) = worst.0.get(&(dtype, what)) {
                println!("  {dtype:?} {what} {share:.3}: {label}");
            }
        }
    }
    let expected = TABLES.iter().find(|t| t.0 == table).map(|t| t.1);
    assert_eq!(Some(count), expected, "cases of the table {table}");
    report(&wrong);
    Ok(())
}

fn compare(
    file: &File,
    case: &Case,
    forward: Forward,
    dtype: DType,
    targets: &Tensor,
    label: &str,
    worst: &mut Worst,
) -> Result<Vec<String>> {
    let logits = tensor(file, case.need("logits")?)?.to_dtype(dtype)?;
    let logits = Var::from_tensor(&logits)?;
    let row_weights = case.row_weights(file, dtype)?;
    let loss = forward(&case.loss(file, dtype)?, row_weights.as_ref(), &logits, targets)?;
    // The loss is f32 for half types, whose precision is too low for a loss.
    let of_loss = if dtype == DType::F64 { dtype } else { DType::F32 };
    let arrived = match case.input(file, "upstream")? {
        Some(grad_output) => (&loss * grad_output.to_dtype(of_loss)?)?.sum_all()?,
        None => loss.clone(),
    };
    let gradients = arrived.backward()?;
    let grad = gradients.get(&logits).ok_or("no gradient arrived")?;

    let name = &case.name;
    let sizes = numbers(tensor(file, &format!("size/{name}"))?)?;
    let (loss_sizes, grad_sizes) = sizes.split_at(loss.elem_count().min(sizes.len()));
    let mut wrong = Comparison {
        what: "loss",
        label,
        logits: dtype,
        roundings: LOSS_ROUNDINGS,
        want: tensor(file, &format!("loss/{name}"))?,
        sizes: loss_sizes,
    }
    .check(&loss, of_loss, worst)?;
    let of_grad = Comparison {
        what: "gradient",
        label,
        logits: dtype,
        roundings: GRAD_ROUNDINGS,
        want: tensor(file, &format!("grad/{name}"))?,
        sizes: grad_sizes,
    };
    wrong.extend(of_grad.check(grad, dtype, worst)?);
    Ok(wrong)
}

/// Results that other libraries' tests contain, to the digits given there.
mod literals {
    use super::*;

    /// candle-nn 0.11 (MIT or Apache-2.0), tests/loss.rs, compared to four decimals.
    #[test]
    fn candle_nn() -> Result<()> {
        let logits = Tensor::new(
            &[
                [1.1050f64, 0.3013, -1.5394, -2.1528, -0.8634],
                [1.0730, -0.9419, -0.1670, -0.6582, 0.5061],
                [0.8318, 1.1154, -0.3610, 0.5351, 1.0830],
            ],
            &Device::Cpu,
        )?;
        let targets = Tensor::new(&[1u32, 0, 4], &Device::Cpu)?;
        for smoothing in
            [Smoothing::none(), Smoothing::over_all(0.0)?, Smoothing::over_others(0.0)?]
        {
            let loss = LabelSmoothingLoss::new(smoothing).on_device(&logits, &targets)?;
            let loss = loss.to_scalar::<f64>()?;
            assert!(abs_diff_eq!(loss, 1.1312, epsilon = 0.5e-4), "{loss}");
        }
        Ok(())
    }

    /// dfdx (MIT or Apache-2.0), the test of its cross-entropy with soft targets. dfdx adds the
    /// loss in f32, so the tolerance is two f32 epsilons. The gradients have seven decimals.
    #[test]
    fn dfdx_soft_targets() -> Result<()> {
        let logits = Tensor::new(
            &[
                [0.01322946f64, 0.7367754, -0.8874471, 0.6997109, 0.98312855],
                [-0.19822043, 1.192167, -0.7495395, -1.5733303, -1.4898887],
            ],
            &Device::Cpu,
        )?;
        let targets = Tensor::new(
            &[
                [0.3180433f64, 0.15164024, 0.2352255, 0.08821669, 0.20687431],
                [0.15627657, 0.29779273, 0.10897867, 0.2879545, 0.14899758],
            ],
            &Device::Cpu,
        )?;
        let want = [
            [-0.0972354, 0.0515665, -0.09250933, 0.07864318, 0.05953507],
            [0.0035581, 0.1792296, -0.0074167, -0.1233234, -0.0520476],
        ];
        let logits = Var::from_tensor(&logits)?;
        let loss = LabelSmoothingLoss::new(Smoothing::none()).on_device(&logits, &targets)?;
        let gradients = loss.backward()?;
        let loss = loss.to_scalar::<f64>()?;
        assert!(abs_diff_eq!(loss, 1.9889611, epsilon = 2.0 * f64::from(f32::EPSILON)), "{loss}");
        let grad = gradients.get(&logits).ok_or("no gradient")?;
        for (got, want) in numbers(grad)?.iter().zip(want.as_flattened()) {
            assert!(abs_diff_eq!(*got, *want, epsilon = 1e-7), "{got} {want}");
        }
        Ok(())
    }

    /// Burn (MIT or Apache-2.0), the test of the `logits` flag, to seven digits.
    #[test]
    fn burn() -> Result<()> {
        let logits = Tensor::new(
            &[
                [0.1f64, 0.2, 0.7, 0.0, 0.0],
                [0.7, 0.1, 0.1, 0.1, 0.0],
                [0.2, 0.2, 0.2, 0.2, 0.2],
                [0.0, 0.3, 0.3, 0.2, 0.2],
            ],
            &Device::Cpu,
        )?;
        let targets = Tensor::new(&[2u32, 0, 4, 1], &Device::Cpu)?;
        let loss = LabelSmoothingLoss::new(Smoothing::none()).on_device(&logits, &targets)?;
        let loss = loss.to_scalar::<f64>()?;
        assert!(abs_diff_eq!(loss, 1.354197, epsilon = 0.5e-6), "{loss}");
        Ok(())
    }
}
