//! What `create` offers for qcow2: the options as tools and QMP spell them.

use super::create::{CreateOptions, create_with_data};
use super::crypto::take_creation;
use block::Error;
use block::create::{CreateRequest, Creator, OptionKind, OptionSpec};

const fn text(name: &'static str, member: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, member), OptionKind::Text, help)
}

const fn switch(name: &'static str, member: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec::new((name, member), OptionKind::Switch, help)
}

/// Spellings of the version.
const VERSIONS: &[(&str, &str)] = &[("0.10", "v2"), ("1.1", "v3")];

/// How qcow2 images are made.
pub(super) const CREATOR: Creator = Creator {
    options: &[
        switch(
            "encryption",
            "encryption",
            "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
        ),
        text(
            "encrypt.format",
            "encrypt.format",
            "Encrypt the image, format choices: 'aes', 'luks'",
        ),
        text(
            "encrypt.key-secret",
            "encrypt.key-secret",
            "ID of secret providing qcow AES key or LUKS passphrase",
        ),
        text(
            "encrypt.cipher-alg",
            "encrypt.cipher-alg",
            "Name of encryption cipher algorithm",
        ),
        text(
            "encrypt.cipher-mode",
            "encrypt.cipher-mode",
            "Name of encryption cipher mode",
        ),
        text(
            "encrypt.ivgen-alg",
            "encrypt.ivgen-alg",
            "Name of IV generator algorithm",
        ),
        text(
            "encrypt.ivgen-hash-alg",
            "encrypt.ivgen-hash-alg",
            "Name of IV generator hash algorithm",
        ),
        text(
            "encrypt.hash-alg",
            "encrypt.hash-alg",
            "Name of encryption hash algorithm",
        ),
        OptionSpec::new(
            ("encrypt.iter-time", "encrypt.iter-time"),
            OptionKind::Number,
            "Time to spend in PBKDF in milliseconds",
        ),
        OptionSpec::new(
            ("cluster_size", "cluster-size"),
            OptionKind::Size,
            "qcow2 cluster size",
        )
        .with_default("65536"),
        switch("extended_l2", "extended-l2", "Extended L2 tables").with_default("off"),
        text(
            "preallocation",
            "preallocation",
            "Preallocation mode (allowed values: off, metadata, falloc, full)",
        ),
        text(
            "compression_type",
            "compression-type",
            "Compression method used for image cluster compression",
        )
        .with_default("zlib"),
        OptionSpec::new(("size", "size"), OptionKind::Size, "Virtual disk size"),
        text(
            "compat",
            "version",
            "Compatibility level (v2 [0.10] or v3 [1.1])",
        )
        .with_aliases(VERSIONS),
        text("backing_file", "backing-file", "File name of a base image"),
        text(
            "backing_fmt",
            "backing-fmt",
            "Image format of the base image",
        ),
        text(
            "data_file",
            "data-file",
            "File name of an external data file",
        ),
        switch(
            "data_file_raw",
            "data-file-raw",
            "The external data file must stay valid as a raw image",
        ),
        switch(
            "lazy_refcounts",
            "lazy-refcounts",
            "Postpone refcount updates",
        )
        .with_default("off"),
        OptionSpec::new(
            ("refcount_bits", "refcount-bits"),
            OptionKind::Number,
            "Width of a reference count entry in bits",
        )
        .with_default("16"),
    ],
    size_unit: 512,
    create: |request| Box::pin(create_image(request)),
};

async fn create_image(request: &mut CreateRequest<'_>) -> Result<(), Error> {
    let options = take_options(request)?;
    let file = request.file().await?;
    let data_file = match &options.data_file {
        Some(name) => Some(request.data_file(name).await?),
        None => None,
    };
    request.finish()?;
    create_with_data(file, data_file, &options).await
}

fn take_options(request: &mut CreateRequest<'_>) -> Result<CreateOptions, Error> {
    let mut options = CreateOptions::new(request.take_length()?);
    if let Some(size) = request.take_size("cluster-size")? {
        options.cluster_size = size;
    }
    if let Some(bits) = request.take_size("refcount-bits")? {
        options.refcount_bits = u32::try_from(bits).unwrap_or(u32::MAX);
    }
    if request.take_choice("version", &["v2", "v3"])? == Some(0) {
        options.version = 2;
    }
    options.encryption = take_creation(request)?;
    options.backing_file = request.take_str("backing-file")?;
    options.backing_format = request.take_str("backing-fmt")?;
    options.lazy_refcounts = request.take_bool("lazy-refcounts")?.unwrap_or(false);
    options.preallocation = request.take_preallocation()?;
    if let Some(number) = request.take_choice("compression-type", &["zlib", "zstd"])? {
        options.compression_type = number as u8;
    }
    options.extended_l2 = request.take_bool("extended-l2")?.unwrap_or(false);
    options.data_file = request.take_str("data-file")?;
    options.data_file_raw = request.take_bool("data-file-raw")?.unwrap_or(false);
    Ok(options)
}
