//! The error type: what the caller gave, and what was expected.

mod convert;
mod hints;

use candle_core::{DType, DeviceLocation};
use hints::{dtype_hint, probabilities_hint, range_hint, shape_hint};
use std::fmt;

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An error that names what was given and what was expected.
///
/// The error converts into [`candle_core::Error`] and back without loss, so `?` works in a function
/// that returns candle's `Result`, and `Error::from` gives the very error back, unless candle's
/// `context` was wrapped around it on the way. `Debug` prints the message, as candle's own error does.
///
/// [`candle_core::Error`]: https://docs.rs/candle-core/latest/candle_core/enum.Error.html
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// ε outside 0 to 1.
    #[error("epsilon is {epsilon}, expected a number from 0 to 1 (ten percent is 0.1)")]
    Epsilon {
        /// The value given.
        epsilon: f64,
    },

    /// A z-loss coefficient that is negative or not finite.
    #[error("the z-loss coefficient is {coefficient}, expected a finite number >= 0")]
    ZLoss {
        /// The value given.
        coefficient: f64,
    },

    /// A logit scale or a softcap that is not finite and greater than 0.
    #[error("the {what} is {value}, expected a finite number greater than 0")]
    NotPositive {
        /// Which option.
        what: &'static str,
        /// The value given.
        value: f64,
    },

    /// Class weights or a prior that are not a list of floating-point numbers.
    #[error(
        "the {what} have dtype {dtype:?} and shape {shape:?}, expected floating-point numbers of shape [num_classes]"
    )]
    VectorType {
        /// Which option.
        what: &'static str,
        /// The dtype given.
        dtype: DType,
        /// The shape given.
        shape: Vec<usize>,
    },

    /// A class weight or a prior probability that is negative or not finite.
    #[error("the {what} hold {value} for class {class}, expected a finite number >= 0")]
    VectorValue {
        /// Which option.
        what: &'static str,
        /// The first class concerned.
        class: usize,
        /// Its value.
        value: f64,
    },

    /// A class weight too large or too small for the arithmetic, which is f32 unless the logits are f64.
    #[error(
        "the class weight {value:?} of class {class} is beyond the arithmetic of these logits, expected 0 or a number from {least:.1e} to {most:.1e}: divide all weights by the largest, and set to 0 what is still too small"
    )]
    WeightRange {
        /// The first class concerned.
        class: usize,
        /// Its weight.
        value: f64,
        /// The least weight other than 0 that is possible.
        least: f64,
        /// The largest weight that is possible.
        most: f64,
    },

    /// A prior whose values do not sum to 1.
    #[error(
        "the prior probabilities sum to {sum}, expected 1 (within 0.001): divide counts by their sum first, in f32 or f64 since half types round by more"
    )]
    PriorSum {
        /// The sum found.
        sum: f64,
    },

    /// Class weights or a prior whose length is not the number of classes.
    #[error("{len} {what} were given for {num_classes} classes, expected one for each class")]
    VectorLength {
        /// Which option.
        what: &'static str,
        /// The number given.
        len: usize,
        /// The number of classes of the logits.
        num_classes: usize,
    },

    /// Logits that are a scalar.
    #[error("the logits are a scalar, expected at least one dimension, the classes")]
    LogitsRank,

    /// A class dimension beyond the rank of the logits.
    #[error("the class dimension is {class_dim}, but logits of shape {shape:?} have dimensions 0 to {}", shape.len().saturating_sub(1))]
    ClassDim {
        /// The dimension given to `with_class_dim`.
        class_dim: usize,
        /// The logits' shape.
        shape: Vec<usize>,
    },

    /// A class dimension of length 0.
    #[error("there are no classes (shape {shape:?}), expected at least one")]
    NoClasses {
        /// The shape given, or asked for.
        shape: Vec<usize>,
    },

    /// `Smoothing::over_others` with one class, which has no other classes.
    #[error(
        "smoothing over the other classes needs at least two classes, got one: use Smoothing::over_all or Smoothing::none"
    )]
    OneClass,

    /// Logits of an unsupported dtype.
    #[error("the logits have dtype {dtype:?}, expected F16, BF16, F32 or F64{}", dtype_hint(*dtype))]
    LogitsDType {
        /// The dtype given.
        dtype: DType,
    },

    /// A tensor too large for the memory or the address space.
    #[error("{what} of shape {shape:?} would be too large for memory")]
    TooLarge {
        /// The name of the tensor.
        what: &'static str,
        /// Its shape.
        shape: Vec<usize>,
    },

    /// Shapes of hidden states, weight and bias that do not fit together.
    #[error(
        "the hidden states have shape {hidden:?}, the weight {weight:?} and the bias {}, expected [.., H], [K, H] and [K] (or no bias), as candle_nn::Linear keeps them",
        or_none(bias)
    )]
    LinearShapes {
        /// The hidden states' shape.
        hidden: Vec<usize>,
        /// The weight's shape.
        weight: Vec<usize>,
        /// The bias's shape, if there is one.
        bias: Option<Vec<usize>>,
    },

    /// Hidden states, weight and bias of several dtypes.
    #[error(
        "the hidden states have dtype {hidden:?}, the weight {weight:?} and the bias {}, expected F64 for all, or F16, BF16 or F32 for each",
        or_none(bias)
    )]
    LinearDTypes {
        /// The hidden states' dtype.
        hidden: DType,
        /// The weight's dtype.
        weight: DType,
        /// The bias's dtype, if there is one.
        bias: Option<DType>,
    },

    /// Hidden states, weight and bias on several devices.
    #[error(
        "the hidden states are on {hidden:?}, the weight on {weight:?} and the bias on {}, expected one device",
        or_none(bias)
    )]
    LinearDevices {
        /// Where the hidden states are.
        hidden: DeviceLocation,
        /// Where the weight is.
        weight: DeviceLocation,
        /// Where the bias is, if there is one.
        bias: Option<DeviceLocation>,
    },

    /// A class dimension other than the last one, in `forward_linear`.
    #[error(
        "the class dimension is {class_dim}, but forward_linear makes logits whose classes are in the last dimension, {last}"
    )]
    LinearClassDim {
        /// The dimension given to `with_class_dim`.
        class_dim: usize,
        /// The last dimension of the hidden states and the logits.
        last: usize,
    },

    /// Integer targets whose shape is not the logits' without the class dimension.
    #[error(
        "class targets ({dtype:?}) have shape {targets:?}, expected {expected:?}: the shape of the logits {logits:?} without their class dimension {class_dim}{}",
        shape_hint(targets, expected, logits, *class_dim)
    )]
    ClassTargetsShape {
        /// The targets' dtype.
        dtype: DType,
        /// The targets' shape.
        targets: Vec<usize>,
        /// The shape they should have.
        expected: Vec<usize>,
        /// The logits' shape.
        logits: Vec<usize>,
        /// The class dimension.
        class_dim: usize,
    },

    /// Floating-point targets whose shape is not the logits'.
    #[error(
        "floating-point targets ({dtype:?}) are probabilities and need the shape of the logits {logits:?}, got {targets:?}{}",
        probabilities_hint(targets, logits)
    )]
    ProbabilityTargetsShape {
        /// The targets' dtype.
        dtype: DType,
        /// The targets' shape.
        targets: Vec<usize>,
        /// The logits' shape.
        logits: Vec<usize>,
    },

    /// Probabilities for `smooth_targets` whose last dimension is not the number of classes.
    #[error(
        "labels of dtype {dtype:?} are probabilities and need num_classes = {num_classes} as their last dimension, got shape {shape:?}; class indices need an integer dtype: to_dtype(DType::I64)"
    )]
    ProbabilityLabelsShape {
        /// The labels' dtype.
        dtype: DType,
        /// The labels' shape.
        shape: Vec<usize>,
        /// The number of classes asked for.
        num_classes: usize,
    },

    /// Targets or labels of an unsupported dtype.
    #[error("the targets have dtype {dtype:?}, expected {expected}")]
    TargetsDType {
        /// The dtype given.
        dtype: DType,
        /// The dtypes supported here.
        expected: &'static str,
    },

    /// `ignore_index` together with probability targets.
    #[error(
        "ignore_index {ignore_index} was set, but the targets ({dtype:?}) are probabilities, which name no class to ignore: leave it unset, and give such rows the weight 0 with weigh_rows"
    )]
    IgnoreIndexWithProbabilities {
        /// The index set.
        ignore_index: i64,
        /// The targets' dtype.
        dtype: DType,
    },

    /// Metrics with probability targets.
    #[error(
        "the targets ({dtype:?}) are probabilities, and metrics need class indices: pass the class labels, or use forward or forward_linear without metrics"
    )]
    MetricsOfProbabilities {
        /// The targets' dtype.
        dtype: DType,
    },

    /// [`over_unmasked`](crate::Smoothing::over_unmasked) in [`smooth_targets`](crate::smooth_targets), which has no logits.
    #[error(
        "Smoothing::over_unmasked needs the logits, which smooth_targets does not have: use another smoothing, or the loss itself"
    )]
    SmoothTargetsUnmasked,

    /// Row weights of an unsupported dtype.
    #[error(
        "the row weights have dtype {dtype:?}, expected U8, F8E4M3, F16, BF16, F32 or F64: to_dtype(DType::F32)"
    )]
    RowWeightsDType {
        /// The dtype given.
        dtype: DType,
    },

    /// Row weights whose shape is not the logits' without the class dimension.
    #[error(
        "the row weights have shape {weights:?}, expected {expected:?}: the shape of the logits {logits:?} without their class dimension {class_dim}"
    )]
    RowWeightsShape {
        /// The row weights' shape.
        weights: Vec<usize>,
        /// The shape they should have.
        expected: Vec<usize>,
        /// The logits' shape.
        logits: Vec<usize>,
        /// The class dimension.
        class_dim: usize,
    },

    /// Logits and row weights on different devices.
    #[error(
        "the logits are on {logits:?} and the row weights on {weights:?}, expected one device: weights.to_device(logits.device())"
    )]
    RowWeightsDevice {
        /// Where the logits are.
        logits: DeviceLocation,
        /// Where the row weights are.
        weights: DeviceLocation,
    },

    /// A row weight that is negative or not finite in the dtype of the arithmetic, on the CPU.
    #[error(
        "the weight of row {row} is {value:?}, expected a finite number >= 0, in the range of f32 unless the logits are f64"
    )]
    RowWeightValue {
        /// The row, counted over all dimensions but the classes' in row-major order.
        row: usize,
        /// Its weight.
        value: f64,
    },

    /// Logits and targets on different devices.
    #[error(
        "the logits are on {logits:?} and the targets on {targets:?}, expected one device: targets.to_device(logits.device())"
    )]
    DeviceMismatch {
        /// Where the logits are.
        logits: DeviceLocation,
        /// Where the targets are.
        targets: DeviceLocation,
    },

    /// Logits, targets, row weights or labels in f64 on a Metal device.
    #[error(
        "the {what} have dtype F64, which Metal does not have: make them F32 before they go there, or use the CPU"
    )]
    MetalF64 {
        /// Which of them.
        what: &'static str,
    },

    /// A class target out of range, on the CPU.
    #[error("target {target} of row {row} is no class: expected at least 0 and less than {num_classes}{}", range_hint(*target, *num_classes, *function))]
    TargetOutOfRange {
        /// The row, counted over all dimensions but the classes' in row-major order.
        row: usize,
        /// The target found there.
        target: i64,
        /// The number of classes.
        num_classes: usize,
        /// The function that found it, which says how to ignore such targets.
        function: TargetsOf,
    },

    /// A tensor whose layout reaches beyond its storage. Only unchecked constructors make such tensors.
    #[error(
        "a tensor of shape {shape:?}, stride {stride:?} and offset {offset} reaches beyond its storage of {len} elements"
    )]
    Layout {
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        stride: Vec<usize>,
        /// The position of its first element.
        offset: usize,
        /// The number of elements of the storage.
        len: usize,
    },

    /// A layout with too many separate dimensions for a GPU's kernels. Dimensions whose strides follow from each other
    /// count as one.
    #[error(
        "a tensor of shape {shape:?} and stride {stride:?} has more than {most} dimensions that do not follow from each other: make it contiguous() first"
    )]
    TooManyStrides {
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        stride: Vec<usize>,
        /// The largest number of dimensions.
        most: usize,
    },

    /// A shard that ends beyond the last class, or a number of all classes that is 0.
    #[error(
        "the shard has {num_classes_here} classes from first_class = {first_class} on, expected classes below num_classes = {num_classes}, which must not be 0"
    )]
    Shard {
        /// The first class of the shard.
        first_class: usize,
        /// The number of classes of the logits or the weight.
        num_classes_here: usize,
        /// The number of all classes.
        num_classes: usize,
    },

    /// A tensor from `gather` that does not stack the tensors of the processes.
    #[error(
        "gather returned a {dtype:?} tensor of shape {shape:?} on {device:?}, expected a {expected_dtype:?} tensor on {expected_device:?} that stacks tensors of shape {stacked:?}, one for each process"
    )]
    Gathered {
        /// Its dtype.
        dtype: DType,
        /// Its shape.
        shape: Vec<usize>,
        /// Where it is.
        device: DeviceLocation,
        /// The dtype of the tensor of this process.
        expected_dtype: DType,
        /// Where the tensor of this process is.
        expected_device: DeviceLocation,
        /// The shape of the tensor of this process.
        stacked: Vec<usize>,
    },

    /// Processes whose numbers of rows or classes differ, or whose shards do not follow each other.
    #[error("{what} is {found} on process {process}, expected {expected}: {reason}")]
    ShardNumber {
        /// The first process concerned.
        process: usize,
        /// Which number.
        what: &'static str,
        /// The number found.
        found: usize,
        /// The number expected.
        expected: usize,
        /// Why.
        reason: &'static str,
    },

    /// Processes whose targets differ.
    #[error("the targets of process {process} differ from those of process 0, expected the same")]
    ShardTargets {
        /// The first process concerned.
        process: usize,
    },

    /// A process that found an error before the exchange. It returned that error.
    #[error("process {process} found an error in its own arguments, and returned it")]
    ShardFailed {
        /// The first process concerned.
        process: usize,
    },

    /// An error of candle's own.
    #[error(transparent)]
    Candle(candle_core::Error),
}

/// A function that takes class targets. Each has its own way to ignore some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetsOf {
    /// [`LabelSmoothingLoss`](crate::LabelSmoothingLoss): `with_ignore_index`.
    Loss,
    /// [`check_targets`](crate::check_targets): its argument `ignore_index`.
    CheckTargets,
    /// [`smooth_targets`](crate::smooth_targets), which cannot.
    SmoothTargets,
}

impl Error {
    /// The error that `function` returns for this one, which was found in reading targets.
    pub(crate) fn in_function(self, function: TargetsOf) -> Self {
        match self {
            Self::TargetOutOfRange { row, target, num_classes, .. } => {
                Self::TargetOutOfRange { row, target, num_classes, function }
            }
            error => error,
        }
    }
}

fn or_none(value: &Option<impl fmt::Debug>) -> String {
    value.as_ref().map_or("none".to_string(), |value| format!("{value:?}"))
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
