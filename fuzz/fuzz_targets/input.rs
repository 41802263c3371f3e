//! The fuzzer's input: shapes, elements, views and options, which mostly fit together.
//!
//! `Arbitrary` reads fields and variants in the order of their declaration. A change of the order or of a type changes what the
//! stored seeds mean.

use arbitrary::Arbitrary;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor, Var};
use half::f16;

pub const DTYPES: [DType; 11] = [
    DType::F32,
    DType::F64,
    DType::BF16,
    DType::F16,
    DType::U32,
    DType::I64,
    DType::U8,
    DType::I32,
    DType::I16,
    DType::F8E4M3,
    DType::F8E8M0,
];

/// Bounds the elements of a tensor whose results are checked. A longer dimension is always broadcast. Few elements are enough:
/// built for fuzzing, the library shares rows of a few hundred classes between threads.
pub const MAX_ELEMENTS: usize = 1 << 11;

/// The length of a dimension: mostly short, sometimes near a block size of the kernels or larger than memory.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Len(u8);

impl Len {
    pub fn get(self) -> usize {
        const LONG: [usize; 14] =
            [63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 513, 1000, 1025, 2001];
        const HUGE: [usize; 6] = [1 << 25, 1 << 31, 1 << 45, 1 << 59, 1 << 62, usize::MAX];
        let len = usize::from(self.0);
        match len {
            0..200 => len % 7,
            200..236 => len - 192,
            236..250 => LONG[len - 236],
            _ => HUGE[len - 250],
        }
    }
}

/// A shape of up to five dimensions.
#[derive(Arbitrary, Debug)]
pub struct Dims {
    rank: u8,
    lens: [Len; 5],
}

impl Dims {
    /// The lengths. One that would make the tensor too large to be checked is replaced by a short one, unless it is larger than memory.
    pub fn get(&self) -> Vec<usize> {
        let rank = usize::from(self.rank) % 6;
        let mut size = 1usize;
        let fitting = |len: &Len| {
            let fits = |len: usize| len > MAX_ELEMENTS || size.saturating_mul(len) <= MAX_ELEMENTS;
            let len = [*len, Len(len.0 % 7)].map(Len::get).into_iter().find(|len| fits(*len));
            let len = len.unwrap_or(1);
            size = size.saturating_mul(len.max(1));
            len
        };
        self.lens[..rank].iter().map(fitting).collect()
    }
}

/// An endless sequence of elements. It repeats the bytes, each time starting one element later.
#[derive(Arbitrary, Debug)]
pub enum Elements<'a> {
    /// Floats from −8 to 8, or labels below the number of classes.
    Small(&'a [u8]),
    /// The bits of f16, which include NaN and infinity.
    F16Bits(&'a [u8]),
    /// The bits of f64.
    F64Bits(&'a [u8]),
}

impl Elements<'_> {
    pub fn float(&self, i: usize) -> f64 {
        match self {
            Self::Small(bytes) => f64::from(i8::from_le_bytes(nth_bytes(bytes, i))) / 16.,
            Self::F16Bits(bytes) => f16::from_le_bytes(nth_bytes(bytes, i)).to_f64(),
            Self::F64Bits(bytes) => f64::from_le_bytes(nth_bytes(bytes, i)),
        }
    }

    /// A valid label for `Small`, any integer otherwise.
    fn label(&self, i: usize, num_classes: usize) -> i64 {
        match self {
            Self::Small(bytes) => {
                let [byte] = nth_bytes(bytes, i);
                (u64::from(byte) * 0x0101_0101 % num_classes.max(1) as u64).cast_signed()
            }
            Self::F16Bits(bytes) => i16::from_le_bytes(nth_bytes(bytes, i)).into(),
            Self::F64Bits(bytes) => i64::from_le_bytes(nth_bytes(bytes, i)),
        }
    }

    /// A contiguous tensor of the first floats.
    pub fn float_tensor(&self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        let floats = (0..dims.iter().product()).map(|i| self.float(i)).collect();
        cast(Tensor::from_vec::<_, f64>(floats, dims, &Device::Cpu)?, dtype)
    }
}

/// The bytes of element `i`, padded with zeros.
fn nth_bytes<const N: usize>(bytes: &[u8], i: usize) -> [u8; N] {
    let len = (bytes.len() / N).max(1);
    let i = (i + i / len) % len * N;
    std::array::from_fn(|j| bytes.get(i + j).copied().unwrap_or(0))
}

/// `Tensor::to_dtype`, with conversions to the f8 types that candle lacks.
fn cast(tensor: Tensor, dtype: DType) -> Result<Tensor> {
    match dtype {
        DType::F8E4M3 => tensor.to_dtype(DType::F32)?.to_dtype(dtype),
        DType::F8E8M0 => {
            let storage = CpuStorage::F8E8M0(vec![0; tensor.elem_count()]);
            let none = BackpropOp::none();
            Ok(Tensor::from_storage(Storage::Cpu(storage), tensor.shape(), none, false))
        }
        _ => tensor.to_dtype(dtype),
    }
}

/// How a tensor is laid out in its storage.
#[derive(Arbitrary, Debug)]
pub struct ViewSpec {
    /// Rotates the dimensions. Above 250, the storage is also one element too short, which only
    /// `Tensor::from_storage` allows.
    rotation: u8,
    /// The dimension that has `margins`. From 128 on, the order of the dimensions is also reversed.
    narrow_dim: u8,
    /// How many elements of the storage lie before and after the view in that dimension.
    margins: [u8; 2],
    /// One bit for each dimension that is broadcast.
    broadcast_mask: u8,
}

/// A tensor to build.
#[derive(Arbitrary, Debug)]
pub struct TensorSpec<'a> {
    pub dtype: u8,
    pub is_tracked: bool,
    elements: Elements<'a>,
    view: ViewSpec,
}

/// A view and the tensor that it was taken from.
pub struct BuiltTensor {
    /// A variable if the tensor is tracked.
    pub base: Tensor,
    pub view: Tensor,
    /// Whether the shape needs more elements than the storage has.
    pub is_truncated: bool,
}

impl BuiltTensor {
    /// A tensor of the same shape whose storage lacks the last element.
    fn truncated(self) -> Self {
        macro_rules! truncate {
            ($storage:expr, $len:expr, $($dtype:ident)*) => {
                match $storage {
                    $(CpuStorage::$dtype(values) => {
                        CpuStorage::$dtype(values.iter().copied().cycle().take($len).collect())
                    })*
                }
            };
        }
        let view = {
            let (storage, layout) = self.view.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { unreachable!("it is built on the CPU") };
            let storage = truncate!(
                storage, layout.shape().elem_count() - 1,
                U8 U32 I16 I32 I64 BF16 F16 F32 F64 F8E4M3 F6E2M3 F6E3M2 F4 F8E8M0
            );
            let none = BackpropOp::none();
            Tensor::from_storage(Storage::Cpu(storage), layout.shape(), none, false)
        };
        Self { base: view.clone(), view, is_truncated: true }
    }
}

impl TensorSpec<'_> {
    /// Mostly one of the first `usual` dtypes.
    pub fn dtype(&self, usual: usize) -> DType {
        let i = usize::from(self.dtype);
        DTYPES[if i < 220 { i % usual } else { i % DTYPES.len() }]
    }

    /// A tensor of floats, or `None` if its storage would be too large.
    pub fn floats(&self, dims: &[usize], dtype: DType) -> Result<Option<BuiltTensor>> {
        self.build(dims, |dims| self.elements.float_tensor(dims, dtype))
    }

    /// A tensor of labels, or `None` if its storage would be too large.
    pub fn labels(
        &self,
        dims: &[usize],
        dtype: DType,
        classes: usize,
    ) -> Result<Option<BuiltTensor>> {
        self.build(dims, |dims| {
            let labels = (0..dims.iter().product()).map(|i| self.elements.label(i, classes));
            cast(Tensor::from_vec::<_, i64>(labels.collect(), dims, &Device::Cpu)?, dtype)
        })
    }

    fn build(
        &self,
        dims: &[usize],
        base: impl Fn(&[usize]) -> Result<Tensor>,
    ) -> Result<Option<BuiltTensor>> {
        let rank = dims.len();
        let ViewSpec { rotation, narrow_dim, margins, broadcast_mask } = self.view;
        let stored = |(dim, &len)| {
            if len > MAX_ELEMENTS || broadcast_mask >> dim & 1 == 1 { 1 } else { len }
        };
        let stored: Vec<usize> = dims.iter().enumerate().map(stored).collect();
        let mut order: Vec<usize> =
            (0..rank).map(|dim| (dim + usize::from(rotation)) % rank.max(1)).collect();
        if narrow_dim >= 128 {
            order.reverse();
        }
        let mut base_dims = vec![0; rank];
        order.iter().zip(&stored).for_each(|(&from, &len)| base_dims[from] = len);
        let narrow_dim = usize::from(narrow_dim) % rank.max(1);
        let [before, after] = margins.map(|margin| usize::from(margin % 4));
        let narrow_len = base_dims.get(narrow_dim).copied();
        if let Some(len) = base_dims.get_mut(narrow_dim) {
            *len += before + after;
        }
        let size = base_dims.iter().try_fold(1usize, |size, &len| size.checked_mul(len));
        if size.is_none_or(|size| size > 2 * MAX_ELEMENTS) {
            return Ok(None);
        }
        let mut base = base(&base_dims)?;
        if self.is_tracked && base.dtype() != DType::F8E8M0 {
            base = Var::from_tensor(&base)?.into_inner();
        }
        let mut view = base.clone();
        if let Some(len) = narrow_len {
            view = view.narrow(narrow_dim, before, len)?.permute(order)?;
        }
        if view.dims() != dims {
            view = view.broadcast_as(dims)?;
        }
        let built = BuiltTensor { base, view, is_truncated: false };
        let size = dims.iter().try_fold(1usize, |size, len| size.checked_mul(*len));
        let can_be_truncated = size.is_some_and(|size| (1..=MAX_ELEMENTS).contains(&size));
        let is_truncated = can_be_truncated && self.view.rotation > 250;
        Ok(Some(if is_truncated { built.truncated() } else { built }))
    }
}

/// Epsilon or the z-loss coefficient.
#[derive(Arbitrary, Debug)]
pub enum Scalar {
    /// From 0 to 1.
    Fraction(u8),
    Any(f64),
}

impl Scalar {
    pub fn get(&self) -> f64 {
        match self {
            Self::Fraction(byte) => f64::from(byte % 33) / 32.,
            Self::Any(value) => *value,
        }
    }
}

/// Class weights or a prior.
#[derive(Arbitrary, Debug)]
pub struct ClassVector<'a> {
    mistake: Mistake,
    /// The length if there is a mistake.
    len: Len,
    tensor: TensorSpec<'a>,
}

impl ClassVector<'_> {
    /// The vector, which is valid if its elements are `Small` and there is no mistake.
    pub fn build(&self, num_classes: usize, is_prior: bool) -> Result<Option<BuiltTensor>> {
        let elements = &self.tensor.elements;
        let is_small = matches!(elements, Elements::Small(_));
        let len = if self.mistake.get().is_some() { self.len.get() } else { num_classes };
        let dims: &[usize] = if self.mistake.get() == Some(0) { &[len, 1] } else { &[len] };
        let dtype = self.tensor.dtype(4);
        self.tensor.build(dims, |dims| {
            let floats = elements.float_tensor(dims, DType::F64)?;
            let floats = if is_small { floats.abs()? } else { floats };
            let sum = floats.sum_all()?;
            let normalize = is_prior && is_small && sum.to_scalar::<f64>()? > 0.;
            cast(if normalize { floats.broadcast_div(&sum)? } else { floats }, dtype)
        })
    }
}

/// One of eight mistakes in a call, rarely; mostly none.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Mistake(u8);

impl Mistake {
    /// The number of the mistake, below 8.
    pub fn get(self) -> Option<u8> {
        self.0.checked_sub(248)
    }
}

#[derive(Arbitrary, Debug)]
pub enum Convention<'a> {
    None,
    All(Scalar),
    Others(Scalar),
    Toward(Scalar, ClassVector<'a>),
}

#[derive(Arbitrary, Debug)]
pub enum IgnoreIndex {
    Small(i8),
    Any(i64),
}

impl IgnoreIndex {
    pub fn get(&self) -> i64 {
        match self {
            Self::Small(index) => i64::from(*index),
            Self::Any(index) => *index,
        }
    }
}

#[derive(Arbitrary, Debug)]
pub struct Options<'a> {
    pub convention: Convention<'a>,
    pub reduction: u8,
    pub class_weights: Option<ClassVector<'a>>,
    pub ignore_index: Option<IgnoreIndex>,
    pub class_dim: Option<u8>,
    pub z_loss: Option<Scalar>,
    /// The epsilon of `over_unmasked`, which replaces the convention.
    pub unmasked: Option<Scalar>,
    pub row_weights: Option<RowWeights<'a>>,
    pub scale: Option<Scalar>,
    pub cap: Option<Scalar>,
    /// Replaces `Mean` by `MeanOrZero`.
    pub zero_if_empty: bool,
    /// In bytes.
    pub logits_budget: Option<u16>,
}

/// What the loss and the gradient of a valid call are compared with, besides the formula.
#[derive(Arbitrary, Debug)]
pub enum Comparison {
    Formula,
    /// The loss and the gradient of contiguous copies, which must have the same bits.
    Views,
    /// The call with metrics.
    Metrics,
    /// The call over three processes. The numbers choose the limits of their shards.
    Shards([u8; 2]),
}

/// The function to call, with the arguments that only this function takes.
#[derive(Arbitrary, Debug)]
pub enum Call<'a> {
    Forward {
        logits: TensorSpec<'a>,
    },
    Linear {
        hidden_size: Len,
        hidden: TensorSpec<'a>,
        weight: TensorSpec<'a>,
        bias: Option<TensorSpec<'a>>,
        tile: Option<[u8; 2]>,
        mistake: Mistake,
    },
    SmoothTargets {
        num_classes: Option<Len>,
    },
    CheckTargets {
        num_classes: Option<Len>,
    },
}

/// Weights of the rows.
#[derive(Arbitrary, Debug)]
pub struct RowWeights<'a> {
    mistake: Mistake,
    tensor: TensorSpec<'a>,
}

impl RowWeights<'_> {
    /// The weights, which are valid if their elements are `Small` and there is no mistake.
    pub fn build(&self, rows: &[usize]) -> Result<Option<BuiltTensor>> {
        let mut dims = rows.to_vec();
        match self.mistake.get() {
            Some(0..4) => dims.push(1),
            Some(_) => drop(dims.pop()),
            None => {}
        }
        let elements = &self.tensor.elements;
        let dtype = match self.tensor.dtype(5) {
            DType::U32 => DType::U8,
            dtype => dtype,
        };
        if dtype.is_int() {
            return self.tensor.labels(&dims, dtype, 3);
        }
        self.tensor.build(&dims, |dims| {
            let floats = elements.float_tensor(dims, DType::F64)?;
            let is_small = matches!(elements, Elements::Small(_));
            cast(if is_small { floats.relu()? } else { floats }, dtype)
        })
    }
}

#[derive(Arbitrary, Debug)]
pub struct Input<'a> {
    pub call: Call<'a>,
    /// The shape of the logits.
    pub dims: Dims,
    pub comparison: Comparison,
    pub options: Options<'a>,
    pub targets: TensorSpec<'a>,
    pub targets_mistake: Mistake,
    pub grad_output: Elements<'a>,
}
