//! The loss as its user sees it: options, validation, reduction.

use crate::backend::{self, Coefficients, Problem, Reduce, cpu, result_dtype};
use crate::error::{Error, Result};
use crate::op::{self, Losses};
use crate::smoothing::{self, Smoothing};
use candle_core::{DType, Device, Storage, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

/// How the rows' losses become the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reduction {
    /// No reduction: a loss for each row, 0 for ignored rows, in the logits' shape without the class
    /// dimension.
    None,
    /// The sum of the rows' losses, a scalar; 0 if there are none. What a batch in several pieces needs:
    /// see [the guide](crate::guide::accumulation).
    Sum,
    /// The mean of the rows' losses, a scalar, by PyTorch's rule: for class targets the sum is
    /// divided by Σ w_y over the rows that are not ignored (their number, without class weights),
    /// for probability targets by the number of rows. If there is no row, or all are ignored, it is NaN
    /// and the gradient 0. If the weights of all targets are 0, it is a division by 0: infinite or NaN,
    /// and so is the gradient.
    #[default]
    Mean,
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
/// which for w = 1 and z = 0 is the cross-entropy −Σ q_k·log softmax(x)_k, and agrees with
/// PyTorch's `CrossEntropyLoss` option by option.
///
/// The loss is a builder: each `with_` method takes it and gives it back. It remembers nothing of what
/// it is used on, may be cloned and shared between threads, and is meant to be built once and used at
/// every step.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
///
/// let logits = Var::new(&[[1f32, 2., 3.], [3., 1., 2.]], &Device::Cpu)?;
/// let targets = Tensor::new(&[2u32, 0], &Device::Cpu)?;
///
/// let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?);
/// let loss = loss.forward(&logits, &targets)?;
/// assert!((loss.to_scalar::<f32>()? - 0.5576).abs() < 1e-4);
///
/// let gradients = loss.backward()?;
/// assert_eq!(gradients.get(&logits).map(|g| g.dims()), Some(&[2, 3][..]));
/// # Ok::<(), candle_label_smoothing::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LabelSmoothingLoss {
    smoothing: Smoothing,
    reduction: Reduction,
    class_weights: Option<Arc<[f64]>>,
    ignore_index: Option<i64>,
    class_dim: Option<usize>,
    z_loss: f64,
    /// The coefficients that differ from class to class, once for each device and dtype they were
    /// used with.
    tables: Arc<Mutex<Vec<Tensor>>>,
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
            tables: Arc::default(),
        }
    }

    /// Sets how the rows' losses are reduced; [`Reduction::Mean`] otherwise.
    pub fn with_reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// Weighs each class: `weights` has shape (K), dtype F8E4M3, F16, BF16, F32 or F64, and any device. It is
    /// read to the host here and taken as a constant.
    ///
    /// As in PyTorch, the weight w_k stands at each class's term of the sum, so with smoothing the
    /// other classes' weights count too; [`Reduction::Mean`] divides by the weights of the targets if
    /// these are class indices. The weights are rounded to the dtype of the arithmetic, f32 unless the
    /// logits are f64. [The guide](crate::guide::class_weights) says how to choose them.
    ///
    /// # Errors
    /// More or fewer dimensions than one, another dtype, values that are negative or not finite, sizes
    /// beyond the memory, and errors of the device they are read from. That the length is K, and that each
    /// weight is 0 or from 2e-31 to 2e31 (4e-301 to 1e301 for f64 logits), so that neither their sums nor
    /// parts of them are lost, is checked by [`forward`](Self::forward).
    pub fn with_class_weights(mut self, weights: &Tensor) -> Result<Self> {
        self.class_weights = Some(smoothing::vector(CLASS_WEIGHTS, weights)?.into());
        self.tables = Arc::default();
        Ok(self)
    }

    /// Leaves out the rows whose class target is `index`, which need not be a class: padding, say.
    /// Their loss and gradient are exactly 0, whatever their logits hold, and [`Reduction::Mean`]
    /// does not count them. PyTorch's default is −100; here nothing is ignored unless it is set.
    ///
    /// Targets are compared as `i64`, so −100 needs targets of a signed dtype. Probabilities name no
    /// class: with them an ignored index is an error of [`forward`](Self::forward).
    pub fn with_ignore_index(mut self, index: i64) -> Self {
        self.ignore_index = Some(index);
        self
    }

    /// Sets the dimension of the logits that holds the classes; the last one otherwise. For
    /// PyTorch's image layout (N, C, H, W) it is 1. That the logits have this dimension is checked by
    /// [`forward`](Self::forward); [`forward_linear`](Self::forward_linear) takes the last one alone. Where the
    /// targets' shape fits several dimensions, as it does for probabilities and for C = H = W, a wrong
    /// one is no error.
    pub fn with_class_dim(mut self, dim: usize) -> Self {
        self.class_dim = Some(dim);
        self
    }

    /// Adds `coefficient`·lse² to each row's loss, which keeps the logits from drifting: the z-loss
    /// of [PaLM](https://arxiv.org/abs/2204.02311), with 1e-4 there. Class weights do not enter it;
    /// ignored rows add nothing; [`Reduction::Mean`] divides it like the rest of the loss.
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

    /// The loss of `logits` for `targets`.
    ///
    /// `logits` are unnormalised: no softmax before this. Their shape is (.., K), of any rank from 1
    /// on, or has the classes at [`with_class_dim`](Self::with_class_dim); their dtype is f16, bf16,
    /// f32 or f64; their layout is any, views included. `targets` are, on the same device,
    /// - class indices, of any integer dtype, in the logits' shape without the class dimension; or
    /// - probabilities, of dtype F8E4M3, F16, BF16, F32 or F64, in the logits' own shape, taken as constants: no
    ///   gradient flows to them.
    ///
    /// Some mistakes give a number all the same. After a softmax a model hardly learns, since no logit
    /// leads another by more than 1. Probabilities are not checked to sum to one, nor to be positive: another sum weighs
    /// the row. If logits and probabilities change places, no gradient reaches the model. A single logit a row, as
    /// for a sigmoid, is one class and has loss 0: two classes need two.
    ///
    /// The result is f64 for f64 logits and f32 otherwise: a scalar, or with [`Reduction::None`] a
    /// loss a row. The arithmetic runs in the result's dtype. The gradient has the logits' dtype;
    /// only first-order gradients exist, as everywhere in candle. The logits are read once here and
    /// once more by `backward`, and nothing of their size is allocated but the gradient; beside it there
    /// are some numbers a row.
    ///
    /// # Errors
    /// Shapes, dtypes or devices that do not fit together or are not supported, a class dimension
    /// that does not exist, K = 0, K = 1 with [`Smoothing::over_others`], class weights or a prior of
    /// another length than K, `ignore_index` with probabilities, a class target that is neither in 0
    /// to K−1 nor the ignored index, and sizes beyond the memory. On a GPU such a target is no error but
    /// makes its row's loss and gradient NaN, and with it the sum or mean: see [`check_targets`]. Errors of
    /// the device and its compiler are candle's own.
    pub fn forward(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let (problem, targets) = self.problem(&Logits::of(logits), targets)?;
        let reduce = self.reduce(logits.dims(), problem.class_dim, &targets);
        let Losses { result, reduced, statistics } =
            op::forward(&problem, logits, &targets, reduce, logits.track_op())?;
        let Some(statistics) = statistics else {
            return Ok(result);
        };
        // A node has three arguments; of constants nobody asks a gradient.
        op::graft(&result, [logits, &result, &result], move |[logits, ..], gradient| {
            let rows = backend::row_shape(logits.dims(), problem.class_dim);
            let upstream = reduced.upstream(gradient, rows)?;
            let gradient = op::gradient_of(&problem, &statistics, logits, &targets, &upstream)?;
            Ok([Some(gradient), None, None])
        })
    }

    /// What becomes of the losses of the rows of logits of these dimensions.
    pub(crate) fn reduce(&self, logits: &[usize], class_dim: usize, targets: &Tensor) -> Reduce {
        let counted = targets.dtype().is_int()
            && (self.class_weights.is_some() || self.ignore_index.is_some());
        let num_rows = backend::num_rows(logits, class_dim);
        match self.reduction {
            Reduction::None => Reduce::No,
            Reduction::Sum => Reduce::DividedBy(1.),
            Reduction::Mean if counted => Reduce::DividedByWeights,
            Reduction::Mean => Reduce::DividedBy(num_rows as f64),
        }
    }

    /// Checks everything that can be told without reading the targets.
    pub(crate) fn problem(&self, logits: &Logits, targets: &Tensor) -> Result<(Problem, Tensor)> {
        let Logits { dims, dtype, device } = *logits;
        let class_dim = self.class_dim(dims)?;
        let num_classes = dims[class_dim];
        if num_classes == 0 {
            return Err(Error::NoClasses { shape: dims.to_vec() });
        }
        if !backend::is_of_logits(dtype) {
            return Err(Error::LogitsDType { dtype });
        }
        backend::check_size("logits", dims)?;
        if let Some(weights) = &self.class_weights {
            smoothing::check_length(CLASS_WEIGHTS, weights, num_classes)?;
        }
        self.smoothing.check(num_classes)?;

        let (on, targets_on) = (device.location(), targets.device().location());
        if on != targets_on {
            return Err(Error::DeviceMismatch { logits: on, targets: targets_on });
        }
        backend::check_dtype("logits", dtype, device)?;
        backend::check_dtype("targets", targets.dtype(), targets.device())?;
        self.check_targets_type(dims, targets, class_dim)?;

        let problem = Problem {
            class_dim,
            num_classes,
            first_class: 0,
            coefficients: self.coefficients(num_classes, result_dtype(dtype), device)?,
            ignore_index: self.ignore_index,
            z_loss: self.z_loss,
        };
        Ok((problem, backend::readable_targets(targets)?))
    }

    pub(crate) fn reduction(&self) -> Reduction {
        self.reduction
    }

    pub(crate) fn class_dim(&self, logits: &[usize]) -> Result<usize> {
        let Some(last) = logits.len().checked_sub(1) else {
            return Err(Error::LogitsRank);
        };
        match self.class_dim {
            Some(class_dim) if class_dim > last => {
                Err(Error::ClassDim { class_dim, shape: logits.to_vec() })
            }
            class_dim => Ok(class_dim.unwrap_or(last)),
        }
    }

    fn check_targets_type(
        &self,
        logits: &[usize],
        targets: &Tensor,
        class_dim: usize,
    ) -> Result<()> {
        let dtype = targets.dtype();
        if dtype.is_float() {
            if targets.dims() != logits {
                return Err(Error::ProbabilityTargetsShape {
                    dtype,
                    targets: targets.dims().to_vec(),
                    logits: logits.to_vec(),
                });
            }
            // After the shape, by which class indices in a float dtype are told from probabilities.
            if let Some(ignore_index) = self.ignore_index {
                return Err(Error::IgnoreIndexWithProbabilities { ignore_index, dtype });
            }
        } else {
            let expected = backend::row_shape(logits, class_dim);
            if targets.dims() != expected {
                return Err(Error::ClassTargetsShape {
                    dtype,
                    targets: targets.dims().to_vec(),
                    expected,
                    logits: logits.to_vec(),
                    class_dim,
                });
            }
        }
        Ok(())
    }

    /// The formula's coefficients, for arithmetic in `dtype`. Class weights and priors go to a device once.
    fn coefficients(
        &self,
        num_classes: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Coefficients> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let known = tables
            .iter()
            .find(|table| table.dtype() == dtype && table.device().same_device(device));
        if let Some(table) = known {
            return Ok(Coefficients::PerClass(table.clone()));
        }
        let weights = self.class_weights.as_deref();
        let coefficients = self.smoothing.coefficients(weights, num_classes, dtype, device)?;
        if let Coefficients::PerClass(table) = &coefficients {
            tables.push(table.clone());
        }
        Ok(coefficients)
    }
}

const CLASS_WEIGHTS: &str = "class weights";

/// What can be said of logits without reading them; they need not be there.
pub(crate) struct Logits<'a> {
    pub dims: &'a [usize],
    pub dtype: DType,
    pub device: &'a Device,
}

impl<'a> Logits<'a> {
    pub fn of(tensor: &'a Tensor) -> Self {
        Self { dims: tensor.dims(), dtype: tensor.dtype(), device: tensor.device() }
    }
}

/// Checks class targets against the number of classes.
///
/// `targets` are class indices of any shape and integer dtype; each must lie in 0 to K−1 with K =
/// `num_classes`, or equal `ignore_index`. [`LabelSmoothingLoss::forward`] does the same on the
/// CPU; on a GPU it would have to wait for the device, so there a bad target makes its row's loss
/// NaN, and this function finds out which it was. It waits for the device and copies the targets to
/// the host.
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
/// The first target that is neither a class nor ignored, with its row; a floating-point dtype; a view larger than can
/// be addressed, or than its storage.
pub fn check_targets(
    targets: &Tensor,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<()> {
    if !targets.dtype().is_int() {
        return Err(Error::TargetsDType {
            dtype: targets.dtype(),
            expected: "an integer dtype: class indices",
        });
    }
    backend::check_size("targets", targets.dims())?;
    let targets = backend::readable_targets(&targets.to_device(&Device::Cpu)?)?;
    let (storage, layout) = targets.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => cpu::check_labels((storage, layout), num_classes, ignore_index),
        _ => Ok(()),
    }
}
