//! Work that must not hold up the thread it is asked on, or must not end with whoever asked.

use control::refusal::Refusal;

/// Runs what blocks its thread on one that may wait.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work);
    done.await.map_err(|e| Refusal::internal(e.to_string()))?.map_err(Refusal::internal)
}

/// Does work that changes something to its end, also if whoever asked hangs up: a change that was dropped
/// half-way would be there on disk and not in memory.
pub(crate) async fn run_uncancelled<T: Send + 'static>(
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|e| Err(Refusal::internal(format!("the node failed: {e}"))))
}
