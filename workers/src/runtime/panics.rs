//! What a panic says may hold what a tool was given.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::sync::Arc;

use capx_core::domain::secret::Secrets;

tokio::task_local! {
    /// What the attempt of this task was given.
    static GIVEN: Option<Arc<Secrets>>;
}

/// Does an attempt that was given secrets.
pub async fn given<T>(secrets: Option<Arc<Secrets>>, attempt: impl Future<Output = T>) -> T {
    GIVEN.scope(secrets, attempt).await
}

/// What a panic says, without the secrets of its attempt.
pub(super) fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    let mut text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned();
    let _ = GIVEN.try_with(|given| given.as_ref().map(|secrets| secrets.redactor().text(&mut text)));
    text
}

/// Panics are told in the log, where secrets are taken out, and no more on stderr.
pub fn install_hook() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string);
        // Where RUST_BACKTRACE asks for it.
        let backtrace = Backtrace::capture();
        let backtrace = (backtrace.status() == BacktraceStatus::Captured).then(|| backtrace.to_string());
        tracing::error!(place, said = said(info.payload()), backtrace, "a panic");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_panic_says_holds_no_secret() {
        let secrets = Secrets::new(vec![("A".into(), "hunter-22-canary".into())]).map(Arc::new);
        let text = "no hunter-22-canary".to_owned();
        assert_eq!(given(secrets, async { said(&text) }).await, "no [secret A]");
        assert_eq!(said(&"plain"), "plain");
        assert_eq!(given(None, async { said(&7) }).await, "no message");
    }
}
