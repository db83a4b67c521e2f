//! The one form in which the API refuses: a status and `{"error": {"code", "message", "hint"}}`.

use std::borrow::Cow;
use std::fmt;

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use block::DiskError;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A request was refused or failed.
///
/// `code` is for programs and never changes its meaning; `message` and `hint` are for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// A word such as `no_such_image`.
    pub code: Cow<'static, str>,
    /// What was wrong, with which value.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// The body of a refusal.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorBody {
    /// Why.
    pub error: ErrorDetail,
}

/// Why a request was refused.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct ErrorDetail {
    /// A word for programs, such as `no_such_image`.
    pub code: String,
    /// What was wrong, with which value.
    pub message: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl ApiError {
    /// A refusal with its status, its word for programs and its sentence for people.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code: Cow::Borrowed(code), message: message.into(), hint: None }
    }

    /// Adds what to do.
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// The request makes no sense (400).
    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// The peer is known and may not do this (403).
    pub fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, message)
    }

    /// What was named does not exist (404).
    pub fn not_found(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// It contradicts what is there (409).
    pub fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    /// It would work at another time (503).
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message)
    }

    /// We failed (500). The message reaches the peer, so it says nothing secret.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    /// Reads the refusal in an answer of `status`; a body of another form is quoted in part.
    pub(crate) fn from_answer(status: StatusCode, body: &[u8]) -> Self {
        /// How much of an unexpected body a person is shown.
        const QUOTED_CHARS_MAX: usize = 200;
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody { error: ErrorDetail { code, message, hint } }) => {
                Self { status, code: Cow::Owned(code), message, hint }
            }
            Err(_) => {
                let text = String::from_utf8_lossy(body);
                let quoted = text.chars().take(QUOTED_CHARS_MAX).flat_map(char::escape_debug);
                Self::new(status, "unknown", format!("{status}: {}", quoted.collect::<String>()))
            }
        }
    }
}

impl From<DiskError> for ApiError {
    fn from(error: DiskError) -> Self {
        match error {
            DiskError::NoSpace => Self::conflict("disk_full", error.to_string())
                .with_hint("make room on the file system of the node's directory, then try again"),
            other => Self::internal(other.to_string()),
        }
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, ": {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ApiError {}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let error = ErrorDetail { code: self.code.into_owned(), message: self.message, hint: self.hint };
        (self.status, axum::Json(ErrorBody { error })).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_form_is_quoted_without_control_characters_and_in_part() {
        let body = format!("\x1b[31m{}", "x".repeat(10_000));
        let error = ApiError::from_answer(StatusCode::BAD_GATEWAY, body.as_bytes());
        assert_eq!(error.code, "unknown");
        assert!(error.message.starts_with("502 Bad Gateway"), "{error}");
        assert!(!error.message.contains('\x1b') && error.message.len() < 300, "{error}");
    }
}
