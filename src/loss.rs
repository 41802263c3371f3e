//! The loss: its options, and the call of the kernels.

mod validate;

use crate::autograd::{self, ComputedLoss};
use crate::error::{Error, Result, TargetsOf};
use crate::exchange::Shard;
use crate::formula::LossParams;
use crate::layout::row_shape;
use crate::metrics::Metrics;
use crate::smoothing::{self, Smoothing};
use candle_core::{DType, Device, Tensor};
use std::sync::{Arc, Mutex};

/// How the losses of the rows become the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reduction {
    /// No reduction: the loss of each row, 0 for ignored rows. The shape is the logits' without the class dimension.
    None,
    /// The sum of the rows' losses, a scalar; 0 without rows. Gradient accumulation over several batches needs it: see
    /// [the guide](crate::guide::accumulation).
    Sum,
    /// The mean of the rows' losses, a scalar, by PyTorch's rule. For class targets the divisor is Σ w_y over the rows
    /// that are not ignored (their number, without class weights). For probability targets it is the number of rows.
    /// Without rows, or if all are ignored, the mean is NaN and the gradient 0. If the weights of all targets are 0, the
    /// division by 0 makes the mean and the gradient infinite or NaN. With [`weigh_rows`](LabelSmoothingLoss::weigh_rows) the
    /// weight of each row is a factor of its term in the divisor.
    #[default]
    Mean,
    /// The mean. If its divisor is 0, the result and the gradient are exactly 0: without rows, if no row counts, or if the
    /// weights of all targets are 0. It suits a mask under which a batch may be empty. Elsewhere it has the bits of the mean. On
    /// a GPU the kernel decides.
    MeanOrZero,
}

/// Cross-entropy with label smoothing, of logits and class indices or probabilities.
///
/// For a row of logits x over K classes, with the smoothed targets q of [`Smoothing`], class weights
/// w (1 if there are none) and the z-loss coefficient z (0 if not set), the row's loss is
///
/// ```text
/// lse  = log Σ_k exp(x_k)
/// loss = Σ_k w_k·q_k·(lse − x_k) + z·lse²
/// ```
///
/// For w = 1 and z = 0 this loss is the cross-entropy −Σ q_k·log softmax(x)_k. With [`Smoothing::over_all`] and z = 0
/// each option agrees with the same option of PyTorch's `CrossEntropyLoss`.
///
/// The loss is a builder: each `with_` method takes it and returns it. Build it once and use it at every step. It keeps no
/// state of a call, but class weights and priors on each device where it was used. It can be cloned and shared between
/// threads.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
///
/// let logits = Var::new(&[[1f32, 2., 3.], [3., 1., 2.]], &Device::Cpu)?;
/// let targets = Tensor::new(&[2u32, 0], &Device::Cpu)?;
///
/// let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?);
/// let mean = loss.forward(&logits, &targets)?;
/// assert!((mean.to_scalar::<f32>()? - 0.5576).abs() < 1e-4);
///
/// let gradients = mean.backward()?;
/// assert_eq!(gradients.get(&logits).map(|g| g.dims()), Some(&[2, 3][..]));
/// # Ok::<(), candle_label_smoothing::Error>(())
/// ```
///
/// # Threads and CUDA streams
///
/// The loss is `Send` and `Sync`: threads can call one loss at the same time. On CUDA, a call queues its kernels on the stream of
/// the logits' device.
///
/// - A device of `Device::new_cuda` has one stream for each thread. candle 0.11 does not order these streams, because cudarc
///   tracks events only in a context in which streams were created. Call `device.synchronize()` on the thread that last used a
///   tensor, before another thread uses or drops it. The same holds for dropping the last clone of a loss with class weights, row
///   weights or a prior. The copies of these on a device are ready for all threads: the first call waits for the device.
/// - A device of `Device::new_cuda_with_stream` has one stream for all threads.
/// - Before a CUDA graph captures `forward` or `backward`, run the same calls once on the same thread. The first ones compile
///   kernels, allocate memory for the reduction, copy class weights and wait, which a capture forbids. The graph keeps using that
///   memory, so it must not run at the same time as other calls of the thread that captured it. With
///   `Device::new_cuda_with_stream`, also switch event tracking off (`CudaDevice::disable_event_tracking`), because a capture
///   cannot wait for events before it. For [`forward_linear`](Self::forward_linear) with a bias, or with tensors that are not
///   contiguous, candle copies shapes to the device at each call, unless `CudaDevice::enable_cuda_graph_htod_cache` keeps them.
#[derive(Clone, Debug)]
pub struct LabelSmoothingLoss {
    smoothing: Smoothing,
    reduction: Reduction,
    class_weights: Option<Arc<[f64]>>,
    ignore_index: Option<i64>,
    class_dim: Option<usize>,
    z_loss: f64,
    logit_scale: f64,
    softcap: Option<f64>,
    logits_budget: usize,
    /// Detached.
    row_weights: Option<Tensor>,
    /// [`PerClass`](crate::formula::ClassTable::PerClass), one tensor for each device and dtype used so far.
    class_tables: Arc<Mutex<Vec<Tensor>>>,
}

impl LabelSmoothingLoss {
    /// The loss with this smoothing, [`Reduction::Mean`], and every other option off.
    pub fn new(smoothing: Smoothing) -> Self {
        Self {
            smoothing,
            reduction: Reduction::default(),
            class_weights: None,
            ignore_index: None,
            class_dim: None,
            z_loss: 0.,
            logit_scale: 1.,
            softcap: None,
            logits_budget: DEFAULT_LOGITS_BUDGET,
            row_weights: None,
            class_tables: Arc::default(),
        }
    }

    /// Sets how the rows' losses are reduced; [`Reduction::Mean`] otherwise.
    pub fn with_reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// Sets a weight for each class. `weights` has shape (K), dtype F8E4M3, F16, BF16, F32 or F64, and any device. It is a
    /// constant, and this function copies it to the host.
    ///
    /// As in PyTorch, the weight w_k is a factor of each class's term of the sum. So with smoothing the weights of the
    /// other classes count too. For class targets [`Reduction::Mean`] divides by the weights of the targets. If these are all 0
    /// in a batch, the mean and its gradient are NaN or infinite; with [`Reduction::MeanOrZero`] both are 0. The weights are
    /// rounded to the dtype of the arithmetic, f32 unless the logits are f64. [The guide](crate::guide::class_weights) says how
    /// to choose them.
    ///
    /// # Errors
    /// A rank other than 1, another dtype, values that are negative or not finite, sizes beyond the memory, and errors of
    /// the weights' device. [`forward`](Self::forward) checks that the length is K, and that each weight is 0 or from
    /// 2e-31 to 2e31 (4e-301 to 1e301 for f64 logits). In this range a sum of up to 2²⁴ weights does not overflow.
    pub fn with_class_weights(mut self, weights: &Tensor) -> Result<Self> {
        self.class_weights = Some(smoothing::read_class_vector(CLASS_WEIGHTS, weights)?.into());
        self.class_tables = Arc::default();
        Ok(self)
    }

    /// Ignores the rows whose class target is `index`, for example padding. `index` need not be a class. The loss and the
    /// gradient of an ignored row are exactly 0, even if its logits are NaN, and [`Reduction::Mean`] does not count
    /// it. PyTorch's default is −100. Here no row is ignored by default.
    ///
    /// Targets are compared as `i64`, so −100 needs targets of a signed dtype. With probability targets an ignored index is
    /// an error of [`forward`](Self::forward).
    pub fn with_ignore_index(mut self, index: i64) -> Self {
        self.ignore_index = Some(index);
        self
    }

    /// Sets the class dimension of the logits; by default the last one. For PyTorch's image layout (N, C, H, W) it is 1.
    /// [`forward`](Self::forward) checks that the logits have this dimension.
    /// [`forward_linear`](Self::forward_linear) takes only the last one. A wrong dimension is not detected if the
    /// targets' shape also fits that dimension. Probabilities always fit. Class indices fit if dimensions are equal, as in
    /// C = H = W.
    pub fn with_class_dim(mut self, dim: usize) -> Self {
        self.class_dim = Some(dim);
        self
    }

    /// Adds `coefficient`·lse² to each row's loss, which keeps the logits from drifting. This is the z-loss of
    /// [PaLM](https://arxiv.org/abs/2204.02311), which uses 1e-4. Class weights do not multiply it. Ignored rows
    /// have none. [`Reduction::Mean`] divides it like the rest of the loss.
    ///
    /// # Errors
    /// The coefficient must be finite and not negative.
    pub fn with_z_loss(mut self, coefficient: f64) -> Result<Self> {
        if !(coefficient.is_finite() && coefficient >= 0.) {
            return Err(Error::ZLoss { coefficient });
        }
        self.z_loss = coefficient;
        Ok(self)
    }

    /// Multiplies the logits by `scale` before everything else, in every formula, metric and gradient. A scale of 1/T is a
    /// temperature T. The scale is clamped to the normal numbers of the arithmetic: from 1.2e-38 to 3.4e38, for f64 logits from
    /// 2.2e-308.
    ///
    /// # Errors
    /// The scale must be finite and greater than 0.
    pub fn with_logit_scale(mut self, scale: f64) -> Result<Self> {
        check_positive("logit scale", scale)?;
        self.logit_scale = scale;
        Ok(self)
    }

    /// Replaces the logits x by cap·tanh(x/cap), after [the scale](Self::with_logit_scale), in every formula, metric and
    /// gradient. This is the softcap of [Gemma 2](https://arxiv.org/abs/2408.00118), whose cap is 30. A logit of −∞ stays −∞,
    /// since it marks a masked class.
    ///
    /// On the CPU the capped logit is right to 4 units of its last place, in f32 and f64. The cap is clamped to the normal
    /// numbers of the arithmetic: from 1.2e-38 to 3.4e38, for f64 logits from 2.2e-308.
    ///
    /// # Errors
    /// The cap must be finite and greater than 0.
    pub fn with_softcap(mut self, cap: f64) -> Result<Self> {
        check_positive("softcap", cap)?;
        self.softcap = Some(cap);
        Ok(self)
    }

    /// Sets how many bytes of the logits [`forward_linear`](Self::forward_linear) may keep until `backward`; 512 MiB otherwise.
    ///
    /// `forward_linear` keeps the logits of as many rows as fit: of all rows, or of at least 64. They have the dtype of the
    /// multiplication: f32 for half types on the CPU, otherwise the dtype of the logits. `backward` replaces them by their gradient and
    /// frees them. It computes the other logits again. With a budget of 0 it computes all again: this takes the least memory, and
    /// four matrix multiplications instead of three. Another budget changes the results only by rounding.
    /// [The guide](crate::guide::large_vocabularies) has times and memory.
    ///
    /// The budget is that of one call. If none of the inputs is tracked, the logits are freed at the end of the call. Otherwise they
    /// are freed by `backward`, or when the loss and everything computed from it is dropped. So evaluate with detached tensors, or drop
    /// each loss before the next. A second `backward` computes all logits again. If the memory for the logits within the budget is
    /// refused, `forward_linear` returns an error on the CPU.
    ///
    /// ```
    /// use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
    ///
    /// let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    /// let least_memory = loss.clone().with_logits_budget(0);
    /// let all_logits_kept = loss.with_logits_budget(usize::MAX);
    /// # Ok::<(), candle_label_smoothing::Error>(())
    /// ```
    pub fn with_logits_budget(mut self, bytes: usize) -> Self {
        self.logits_budget = bytes;
        self
    }

    pub(crate) fn logits_budget(&self) -> usize {
        self.logits_budget
    }

    /// This loss for a batch whose rows have these weights. The clone is cheap: it shares the copies of the class weights
    /// on devices. Call this for each batch.
    ///
    /// `weights` has a number for each row, in the shape of class indices: the logits' shape without the class dimension. Its
    /// dtype is U8 (a mask, or any number) or F8E4M3, F16, BF16, F32 or F64, its device the logits', and its layout any. It is a
    /// constant. The weights are rounded to the dtype of the arithmetic, f32 unless the logits are f64.
    ///
    /// The weight multiplies the row's whole loss, its z-loss included. [`Reduction::Mean`] divides by the sum of the products of
    /// the row weights and the labels' class weights, or for probabilities by the sum of the row weights.
    ///
    /// A row of weight 0 is an ignored row: loss and gradient are exactly 0 even if its logits are NaN, and its target is not
    /// looked at. Row weights work for class indices, also beside an ignored index, and for probabilities. Another call replaces
    /// the weights. [The guide](crate::guide::masks) has examples.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
    ///
    /// let loss = LabelSmoothingLoss::new(Smoothing::none()).with_reduction(Reduction::MeanOrZero);
    /// let logits = Tensor::new(&[[1f32, 2.], [f32::NAN, 0.]], &Device::Cpu)?;
    /// let targets = Tensor::new(&[1u32, 7], &Device::Cpu)?;
    /// let mask = Tensor::new(&[1u8, 0], &Device::Cpu)?;
    /// let mean = loss.weigh_rows(&mask)?.forward(&logits, &targets)?;
    /// assert!((mean.to_scalar::<f32>()? - 0.3133).abs() < 1e-4);
    /// # Ok::<(), candle_label_smoothing::Error>(())
    /// ```
    ///
    /// # Errors
    /// None so far. [`forward`](Self::forward) checks the weights: another shape, dtype or device is an error there, and on the CPU a
    /// weight that is negative or not finite. On a GPU such a weight makes the loss and the gradient of its row NaN.
    pub fn weigh_rows(&self, weights: &Tensor) -> Result<Self> {
        Ok(Self { row_weights: Some(weights.detach()), ..self.clone() })
    }

    /// The loss of `logits` for `targets`.
    ///
    /// `logits` are unnormalised: do not apply a softmax before. Their shape is (.., K), of any rank >= 1, unless
    /// [`with_class_dim`](Self::with_class_dim) names another dimension. Their dtype is f16, bf16, f32 or f64. Any layout
    /// works, views included. `targets` are, on the same device,
    /// - class indices, of any integer dtype, in the logits' shape without the class dimension; or
    /// - probabilities, of dtype F8E4M3, F16, BF16, F32 or F64, in the logits' own shape, taken as constants: no
    ///   gradient flows to them.
    ///
    /// These mistakes are not detected:
    /// - A softmax before this function. No logit then exceeds another by more than 1, so the loss stays high and the metrics'
    ///   confidence stays below e/(e+K−1): 0.58 for 3 classes, 0.23 for 10. The accuracy may look right. A `log_softmax` before it
    ///   changes nothing but costs time.
    /// - Probabilities that do not sum to 1, which weigh the row, or that are negative.
    /// - Logits and probabilities in each other's place. No gradient reaches the model.
    /// - One logit a row, as for a sigmoid. That is one class with loss 0; two classes need two logits.
    /// - Images (N, C, H, W) with C = H = W, without [`with_class_dim`](Self::with_class_dim): their last dimension has the classes.
    ///
    /// The result is f64 for f64 logits and f32 otherwise: a scalar, or with [`Reduction::None`] a number a row. The
    /// arithmetic runs in the result's dtype. The gradient has the logits' dtype. Only first-order gradients exist, as
    /// everywhere in candle. This function reads the logits once, and `backward` once more. Neither logits nor targets nor row
    /// weights may change in between. Only the gradient is as large as the logits. Beside it a few numbers a row are allocated.
    /// On the CPU a long row takes 32 bytes for each 16384 classes, or for each 1024 if the classes are not in the last
    /// dimension. With metrics or [`Smoothing::over_unmasked`] it takes 80 bytes.
    ///
    /// # Errors
    /// Shapes, dtypes or devices that do not fit together or are not supported, a class dimension that does not exist,
    /// K = 0, K = 1 with [`Smoothing::over_others`], class weights or a prior whose length is not K, row weights of another shape
    /// or dtype or on another device or, on the CPU, negative or not finite, `ignore_index` with probabilities, class weights
    /// that are too small or too large for the arithmetic, a class target that is neither in 0 to K−1 nor the ignored index, and
    /// sizes beyond the memory. On a GPU a class target out of range is not an error. It makes its row's loss and gradient NaN,
    /// and with them the sum or mean: see [`check_targets`]. A GPU takes at most 16 dimensions whose strides do not follow from
    /// each other. Errors of the device and its compiler are candle's own.
    pub fn forward(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let (params, targets) = self.validate(&LogitsInfo::of(logits), targets)?;
        Ok(forward(params, logits, targets)?.0)
    }

    /// [`forward`](Self::forward) for class indices, with the [`Metrics`] of the rows from the same read of the logits. The loss
    /// and its gradient have the bits of [`forward`](Self::forward).
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
    ///
    /// let logits = Tensor::new(&[[2f32, 0., 0.], [0., 1., 3.]], &Device::Cpu)?;
    /// let targets = Tensor::new(&[0u32, 1], &Device::Cpu)?;
    /// let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    /// let (_loss, metrics) = loss.forward_with_metrics(&logits, &targets)?;
    /// assert_eq!(metrics.prediction.to_vec1::<u32>()?, [0, 2]);
    /// assert_eq!(metrics.accuracy()?.to_scalar::<f32>()?, 0.5);
    /// # Ok::<(), candle_label_smoothing::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward), and targets that are probabilities.
    pub fn forward_with_metrics(
        &self,
        logits: &Tensor,
        targets: &Tensor,
    ) -> Result<(Tensor, Metrics)> {
        let (mut params, targets) = self.validate(&LogitsInfo::of(logits), targets)?;
        ask_for_metrics(&mut params, &targets)?;
        let (loss, metrics) = forward(params, logits, targets)?;
        Ok((loss, metrics.ok_or_else(no_metrics)?))
    }
}

/// The loss as a node of the graph, and the metrics if they were asked for.
fn forward(
    params: LossParams,
    logits: &Tensor,
    targets: Tensor,
) -> Result<(Tensor, Option<Metrics>)> {
    let computed = autograd::forward(&params, logits, &targets)?;
    let metrics = computed.metrics()?;
    Ok((attach_backward(computed, params, logits, targets)?, metrics))
}

/// The loss as a node of the graph that depends on the logits.
pub(crate) fn attach_backward(
    computed: ComputedLoss,
    params: LossParams,
    logits: &Tensor,
    targets: Tensor,
) -> Result<Tensor> {
    // The targets are constants. They only fill the places of an op with three inputs.
    let constants = targets.clone();
    let inputs = [logits, &constants, &constants];
    computed.attach_backward(inputs, move |[logits, ..], grad_result, saved| {
        let grad_output = grad_result.broadcast_as(row_shape(logits.dims(), params.class_dim))?;
        let gradient = autograd::backward(&params, logits, &targets, &grad_output, saved)?;
        Ok([Some(gradient), None, None])
    })
}

/// Makes forward compute metrics too.
pub(crate) fn ask_for_metrics(params: &mut LossParams, targets: &Tensor) -> Result<()> {
    if !targets.dtype().is_int() {
        return Err(Error::MetricsOfProbabilities { dtype: targets.dtype() });
    }
    params.wants_metrics = true;
    Ok(())
}

/// The error for metrics that a backend did not compute, which only a mistake in this crate causes.
pub(crate) fn no_metrics() -> Error {
    candle_core::Error::Msg("the metrics were not computed".to_string()).into()
}

fn check_positive(what: &'static str, value: f64) -> Result<()> {
    match value.is_finite() && value > 0. {
        true => Ok(()),
        false => Err(Error::NotPositive { what, value }),
    }
}

const CLASS_WEIGHTS: &str = "class weights";

/// The bytes of logits that `forward_linear` keeps unless [`LabelSmoothingLoss::with_logits_budget`] says otherwise. All logits of
/// 4096 rows by 32768 classes fit in f32.
const DEFAULT_LOGITS_BUDGET: usize = 512 << 20;

/// The properties of logits that need not exist as a tensor.
pub(crate) struct LogitsInfo<'a> {
    pub dims: &'a [usize],
    pub dtype: DType,
    pub device: &'a Device,
    pub is_tracked: bool,
    /// Which of all classes they have, if they have only some.
    pub shard: Option<Shard>,
}

impl<'a> LogitsInfo<'a> {
    pub fn of(tensor: &'a Tensor) -> Self {
        Self {
            dims: tensor.dims(),
            dtype: tensor.dtype(),
            device: tensor.device(),
            is_tracked: tensor.track_op(),
            shard: None,
        }
    }
}

/// Checks class targets against the number of classes.
///
/// `targets` are class indices of any shape and integer dtype; each must lie in 0 to K−1 with K =
/// `num_classes`, or equal `ignore_index`. [`LabelSmoothingLoss::forward`] checks the same on the CPU, except for rows of weight
/// 0: this function does not know the row weights. On a GPU `forward` would have to wait for the device, so there a bad target
/// makes its row's loss NaN. This function finds such targets. It waits for the device and copies the targets to the host.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_label_smoothing::check_targets;
///
/// let targets = Tensor::new(&[0i64, 2, -100], &Device::Cpu)?;
/// assert!(check_targets(&targets, 3, Some(-100)).is_ok());
///
/// let error = check_targets(&targets, 3, None).unwrap_err();
/// assert!(error.to_string().starts_with("target -100 of row 2 is no class"));
/// # Ok::<(), candle_label_smoothing::Error>(())
/// ```
///
/// # Errors
/// The first target that is neither a class nor ignored, with its row; a floating-point dtype; a view that is larger than the
/// address space or than its storage.
pub fn check_targets(
    targets: &Tensor,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<()> {
    autograd::check_class_targets(targets, num_classes, ignore_index)
        .map_err(|error| error.in_function(TargetsOf::CheckTargets))
}
