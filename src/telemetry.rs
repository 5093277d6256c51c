//! Logs: JSON for machines, pretty on a terminal; on stderr, since stdout is
//! for data.

use std::io::IsTerminal;

use capx_workers::runtime::panics;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Starts logging. `CAPX_LOG` filters (`info` by default), `CAPX_LOG_FORMAT`
/// is `json` or `pretty`.
pub fn start(default: &str) {
    let filter = EnvFilter::try_from_env("CAPX_LOG")
        // apalis tells of its own start and stop; our sessions do so already.
        .unwrap_or_else(|_| EnvFilter::new(format!("{default},apalis_core=warn,sqlx=warn")));
    let pretty = match std::env::var("CAPX_LOG_FORMAT").as_deref() {
        Ok("json") => false,
        Ok("pretty") => true,
        _ => std::io::stderr().is_terminal(),
    };
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_span_events(FmtSpan::NONE);
    if pretty {
        builder.with_target(false).compact().init();
    } else {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).init();
    }
    panics::install_hook();
}
