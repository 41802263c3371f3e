//! The conversions into candle's error and back. They undo each other: `WrappedContext` keeps a foreign error itself, `Wrapped` only its
//! text.

use super::Error;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            error => candle_core::Error::WrappedContext {
                wrapped: Box::new(error),
                context: "in candle-label-smoothing".to_string(),
            },
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        match error {
            candle_core::Error::WrappedContext { wrapped, context } => {
                match wrapped.downcast::<Error>() {
                    Ok(error) => *error,
                    Err(wrapped) => {
                        Error::Candle(candle_core::Error::WrappedContext { wrapped, context })
                    }
                }
            }
            error => Error::Candle(error),
        }
    }
}
