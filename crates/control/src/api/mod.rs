//! What Volt, the nodes and the command line say to each other: the JSON bodies of the HTTP APIs.
//!
//! Both servers and the client use these types, so that a field exists in one place. Sizes are bytes,
//! durations milliseconds, times milliseconds since the UNIX epoch; a field's name says so.

pub mod compute;
pub mod details;
pub mod disk;
pub mod export;
pub mod profile;
pub mod qcow2;
pub mod volt;

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the UNIX epoch.
pub fn now_unix_ms() -> u64 {
    unix_ms(SystemTime::now())
}

/// A time as milliseconds since the UNIX epoch.
pub fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// An OpenAPI document of this title and our version, for routes to be added to.
pub fn openapi_document(title: &str) -> utoipa::openapi::OpenApi {
    let info = utoipa::openapi::InfoBuilder::new().title(title).version(env!("CARGO_PKG_VERSION")).build();
    utoipa::openapi::OpenApiBuilder::new().info(info).build()
}

/// Serves an OpenAPI document at `/v1/openapi.json`.
pub fn openapi_router(document: utoipa::openapi::OpenApi) -> axum::Router {
    axum::Router::new().route("/v1/openapi.json", axum::routing::get(async move || axum::Json(document)))
}
