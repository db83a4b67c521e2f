//! The one form in which the API refuses: a status and `{"error": {"code", "message", "hint"}}`.

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::refusal::{Class, Code, Refusal};

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

/// A request that the transport itself refuses, with its status.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    error: ErrorDetail,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> ApiError {
        ApiError { status, error: ErrorDetail { code: code.to_owned(), message: message.into(), hint: None } }
    }
}

/// The status of each class.
fn status_of(class: Class) -> StatusCode {
    match class {
        Class::Invalid => StatusCode::BAD_REQUEST,
        Class::Forbidden => StatusCode::FORBIDDEN,
        Class::NotFound => StatusCode::NOT_FOUND,
        Class::Conflict => StatusCode::CONFLICT,
        Class::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Class::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The class of a status, which may be one that the transport itself gave.
fn class_of(status: StatusCode) -> Class {
    match status {
        StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => Class::Forbidden,
        StatusCode::NOT_FOUND => Class::NotFound,
        StatusCode::CONFLICT => Class::Conflict,
        StatusCode::SERVICE_UNAVAILABLE => Class::Unavailable,
        other if other.is_client_error() => Class::Invalid,
        _ => Class::Internal,
    }
}

/// Reads the refusal in an answer of `status`; a body of another form is quoted in part.
pub(crate) fn refusal_in(status: StatusCode, body: &[u8]) -> Refusal {
    /// How much of an unexpected body a person is shown.
    const QUOTED_CHARS_MAX: usize = 200;
    match serde_json::from_slice::<ErrorBody>(body) {
        Ok(ErrorBody { error: ErrorDetail { code, message, hint } }) => {
            Refusal { code: Code::of(&code, class_of(status)), message, hint }
        }
        Err(_) => {
            let text = String::from_utf8_lossy(body);
            let quoted: String = text.chars().take(QUOTED_CHARS_MAX).flat_map(char::escape_debug).collect();
            Refusal::new(Code::of("unknown", class_of(status)), format!("{status}: {quoted}"))
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> ApiError {
        let Refusal { code, message, hint } = refusal;
        let status = status_of(code.class());
        ApiError { status, error: ErrorDetail { code: code.word().to_owned(), message, hint } }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, axum::Json(ErrorBody { error: self.error })).into_response()
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        ApiError::from(self).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_another_form_is_quoted_without_control_characters_and_in_part() {
        let body = format!("\x1b[31m{}", "x".repeat(10_000));
        let error = refusal_in(StatusCode::BAD_GATEWAY, body.as_bytes());
        assert_eq!(error.code.word(), "unknown");
        assert!(error.message.starts_with("502 Bad Gateway"), "{error}");
        assert!(!error.message.contains('\x1b') && error.message.len() < 300, "{error}");
    }

    #[test]
    fn a_class_comes_back_from_its_status() {
        use Class::{Conflict, Forbidden, Internal, Invalid, NotFound, Unavailable};
        for class in [Invalid, Forbidden, NotFound, Conflict, Unavailable, Internal] {
            assert_eq!(class_of(status_of(class)), class);
        }
    }
}
