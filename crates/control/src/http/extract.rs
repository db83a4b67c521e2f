//! What handlers take from a request: who asks, and parts whose faults are answered as [`ApiError`].

use std::fmt;

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::ApiError;
use crate::refusal::{Code, Refusal};
use identity::Principal;

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Somebody on this host who may open our UNIX socket.
    Local,
    /// A member of the cluster.
    Remote(Principal),
}

impl Peer {
    /// Only administrators may: the one on this host, and others by certificate.
    pub fn must_be_admin(&self) -> Result<(), Refusal> {
        match self {
            Peer::Local | Peer::Remote(Principal::Admin(_)) => Ok(()),
            Peer::Remote(other) => {
                Err(Refusal::new(Code::NotAnAdmin, format!("{other} is not an administrator")))
            }
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Local => f.write_str("the administrator of this host"),
            Peer::Remote(principal) => principal.fmt(f),
        }
    }
}

/// A request on a connection without a known peer is refused, whatever route it found.
impl<S: Sync> FromRequestParts<S> for Peer {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get().cloned().ok_or_else(|| {
            ApiError::new(StatusCode::UNAUTHORIZED, "unknown_peer", "this connection has no certificate")
        })
    }
}

/// A JSON body, of a request or an answer.
#[derive(Debug, FromRequest)]
#[from_request(via(axum::Json), rejection(ApiError))]
pub struct Json<T>(pub T);

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

/// The variable parts of the path.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(ApiError))]
pub struct Path<T>(pub T);

/// The query.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(ApiError))]
pub struct Query<T>(pub T);

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self::new(rejection.status(), "bad_body", rejection.body_text())
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), "bad_path", rejection.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(rejection.status(), "bad_query", rejection.body_text())
    }
}
