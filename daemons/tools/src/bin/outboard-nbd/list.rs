//! `-L`: what another server offers.

use crate::client::{Client, Export, Greeted};
use crate::help::print;
use crate::options::ListOptions;
use crate::serve::credentials as credentials_of;
use nbd::ExportFlags;
use std::fmt::Write;
use tools::failure::{Failure, Outcome};
use tools::image::Tool;
use transport::{Connection, Endpoint};

/// Flags with their names, in the order of their bits.
const FLAGS: [(ExportFlags, &str); 11] = [
    (ExportFlags::READ_ONLY, "readonly"),
    (ExportFlags::SEND_FLUSH, "flush"),
    (ExportFlags::SEND_FUA, "fua"),
    (ExportFlags::ROTATIONAL, "rotational"),
    (ExportFlags::SEND_TRIM, "trim"),
    (ExportFlags::SEND_WRITE_ZEROES, "zeroes"),
    (ExportFlags::SEND_DF, "df"),
    (ExportFlags::CAN_MULTI_CONN, "multi"),
    (ExportFlags::SEND_RESIZE, "resize"),
    (ExportFlags::SEND_CACHE, "cache"),
    (ExportFlags::SEND_FAST_ZERO, "fast-zero"),
];

/// Asks and prints.
pub(crate) async fn run(tool: &Tool, options: &ListOptions) -> Outcome {
    for object in &options.objects {
        tool.add_object(object)?;
    }
    if options.tls.authz.is_some() {
        let message = "TLS authorization is incompatible with export list";
        return Err(Failure::message(message));
    }
    let tls = &options.tls;
    let credentials = tls.creds.as_deref();
    let credentials = credentials.map(|id| credentials_of(tool, id, Endpoint::Client));
    let credentials = credentials.transpose()?;
    let stream = options.address.connect().await?;
    let exports = match Client::greet(Connection::plain(stream)).await? {
        Greeted::Oldstyle(_) if credentials.is_some() => {
            return Err(Failure::message("Server does not support STARTTLS"));
        }
        Greeted::Oldstyle(export) => vec![export],
        Greeted::Options(mut client) => {
            if let Some(credentials) = credentials {
                let hostname = tls.hostname.as_deref().or(options.address.host());
                client = client.secure(&credentials, hostname).await?;
            }
            client.ask_for_structure().await?;
            let exports = client.list().await?;
            client.leave().await;
            exports
        }
    };
    Ok(print(&text(&exports)))
}

fn text(exports: &[Export]) -> String {
    let mut text = format!("exports available: {}\n", exports.len());
    for export in exports {
        // Writing to a string cannot fail.
        let _ = describe(&mut text, export);
    }
    text
}

fn describe(text: &mut String, export: &Export) -> std::fmt::Result {
    writeln!(text, " export: '{}'", export.name)?;
    if !export.description.is_empty() {
        writeln!(text, "  description: {}", export.description)?;
    }
    if export.flags.contains(ExportFlags::HAS_FLAGS) {
        writeln!(text, "  size:  {}", export.size)?;
        write!(text, "  flags: {:#x} (", export.flags.bits())?;
        for (flag, name) in FLAGS {
            if export.flags.contains(flag) {
                write!(text, " {name}")?;
            }
        }
        writeln!(text, " )")?;
    }
    if let Some(sizes) = export.block_sizes {
        writeln!(text, "  min block: {}", sizes.minimum)?;
        writeln!(text, "  opt block: {}", sizes.preferred)?;
        writeln!(text, "  max block: {}", sizes.maximum)?;
    }
    if !export.contexts.is_empty() {
        let count = export.contexts.len();
        writeln!(text, "  available meta contexts: {count}")?;
        for context in &export.contexts {
            writeln!(text, "   {context}")?;
        }
    }
    Ok(())
}
